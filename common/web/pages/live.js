// What a page tells in its header: whether it is live, and since when it is not.
import {at, setText} from "./parts.js";
import {timeOfDay} from "./format.js";
import {follow} from "./server.js";

const LATE_S = 8;
const CONNECTING = "connecting";

// Calls `show` with all that is told, whose `problem` is why it may be old. Raises nothing: what goes wrong is told in
// the header, in the words that `refused` returns for an error if it returns any, and tried again.
export function showLive(show, refused = () => null) {
  let heardAt = null;
  let problem = CONNECTING;
  const tell = () => {
    const age = heardAt === null ? Infinity : (performance.now() - heardAt) / 1000;
    const live = !problem && age < LATE_S;
    at("state").dataset.is = live ? "live" : heardAt === null && problem === CONNECTING ? "" : "late";
    const since = heardAt === null ? "" : `, as of ${timeOfDay(Date.now() / 1000 - age)}`;
    setText(at("state"), live ? "live" : `${problem || "waiting"}${since}`);
  };
  setInterval(tell, 1000);
  follow(
    (told) => {
      heardAt = performance.now();
      problem = told.problem;
      show(told);
      tell();
    },
    (error) => {
      problem = refused(error) ?? error.message;
      tell();
    },
  );
  tell();
}
