// The leaderboard: peers by the tokens that they answered or trained on.
import {at, fillPager, fillTable, setText} from "./parts.js";
import {UNKNOWN, bytes, count, duration, number, plural, shortId} from "./format.js";
import {peerLink} from "./links.js";
import {Asked} from "./list.js";
import {begin} from "./shell.js";
import {stateOf} from "./state.js";

const SOON_MS = 250;

const COLUMNS = [
  {name: "rank", cell: ({rank}) => count(rank)},
  {
    name: "peer",
    cell: ({peer_id}) => ({text: shortId(peer_id), href: peerLink(peer_id), title: peer_id, className: "mono"}),
  },
  {name: "role", cell: ({role}) => role},
  {name: "tokens", number: true, cell: ({tokens}) => count(tokens)},
  {name: "tokens/s", number: true, cell: ({tokens_per_s}) => count(tokens_per_s)},
  {name: "blocks", number: true, cell: ({blocks, role}) => (role === "host" ? count(blocks) : UNKNOWN)},
  {name: "stale", number: true, cell: ({staleness}) => number(staleness)},
  {name: "exchanged", number: true, cell: ({exchanged_bytes}) => bytes(exchanged_bytes)},
  {name: "up", number: true, cell: ({up_s}) => duration(up_s)},
  {name: "at", cell: ({endpoint}) => endpoint || UNKNOWN},
  {name: "state", cell: stateOf},
];

const list = new Asked(
  "peers",
  {role: "host", search: "", page: "1"},
  (answer) => {
    const none = answer.total === 0;
    at("list").hidden = none;
    at("none").hidden = !none;
    setText(
      at("none"),
      list.asked.search ? "No peer of that role has this in its id or address." : "No peer of that role is announced.",
    );
    setText(at("found"), none ? "" : plural(answer.total, "peer"));
    fillTable(at("peers"), COLUMNS, answer.rows);
    fillPager(at("pager"), answer, "peers", (page) => list.change({page: String(page)}));
  },
  (error) => setText(at("found"), error.message),
);

let soon = 0;
at("role").value = list.asked.role;
at("search").value = list.asked.search;
at("role").addEventListener("change", (event) => list.change({role: event.target.value, page: "1"}));
at("search").addEventListener("input", (event) => {
  clearTimeout(soon);
  soon = setTimeout(() => list.change({search: event.target.value, page: "1"}), SOON_MS);
});
at("find").addEventListener("submit", (event) => event.preventDefault());
begin(() => list.refresh());
list.now();
