// How a peer is, in a word or two.
import {duration} from "./format.js";

export function stateOf({silent, heard_s, paused, reachability}) {
  if (silent) return {text: `silent for ${duration(heard_s)}`, className: "tag bad"};
  if (paused) return {text: "paused", className: "tag"};
  return reachability === "not reached"
    ? {text: "not reached", className: "tag bad"}
    : {text: "live", className: "tag"};
}
