// What hosts, trainers and teams have earned, and all of it as a file.
import {at, fillPager, fillTable, make, setText} from "./parts.js";
import {UNKNOWN, count, plural, shortId} from "./format.js";
import {peerLink} from "./links.js";
import {Asked} from "./list.js";
import {download} from "./server.js";
import {begin} from "./shell.js";

const RANK = {name: "rank", cell: ({rank}) => count(rank)};
const WHO = [
  RANK,
  {
    name: "peer",
    cell: ({peer_id}) => ({text: shortId(peer_id), href: peerLink(peer_id), title: peer_id, className: "mono"}),
  },
  {name: "name", cell: ({name}) => name || UNKNOWN},
  {name: "team", cell: ({team}) => team || UNKNOWN},
];
const PAIRS = [
  {name: "forward pairs", number: true, cell: ({forward_pairs}) => count(forward_pairs)},
  {name: "backward pairs", number: true, cell: ({backward_pairs}) => count(backward_pairs)},
];
const LEARNT = {name: "tokens learnt", number: true, cell: ({tokens_learnt}) => count(tokens_learnt)};
const RECEIPTS = {name: "receipts", number: true, cell: ({receipts}) => count(receipts)};
const COLUMNS = {
  hosts: [...WHO, ...PAIRS, RECEIPTS],
  trainers: [
    ...WHO,
    LEARNT,
    {name: "announced", number: true, cell: ({own_tokens}) => count(own_tokens)},
    RECEIPTS,
    {name: "counts", cell: ({capped}) => (capped ? "in part: more than announced" : "whole")},
  ],
  teams: [
    RANK,
    {name: "team", cell: ({team}) => team},
    {name: "peers", number: true, cell: ({peers}) => count(peers)},
    ...PAIRS,
    LEARNT,
  ],
};
const WORDS = {hosts: "host", trainers: "trainer", teams: "team"};

const list = new Asked(
  "credit",
  {kind: "hosts", page: "1"},
  (answer) => {
    const {kind} = list.asked;
    const none = answer.total === 0;
    at("list").hidden = none;
    at("none").hidden = !none;
    setText(at("none"), answer.problem || `No ${WORDS[kind]} has earned anything yet.`);
    setText(at("found"), none ? "" : plural(answer.total, WORDS[kind]));
    for (const other of Object.keys(COLUMNS)) at(other).hidden = other !== kind;
    fillTable(at(kind), COLUMNS[kind], answer.rows);
    fillPager(at("pager"), answer, kind, (page) => list.change({page: String(page)}));
    const waiting = answer.unseen_receipts
      ? `${plural(answer.unseen_receipts, "receipt")} of peers that were not seen in the run earn nothing yet.`
      : "";
    setText(at("more"), [none ? "" : answer.problem, waiting].filter(Boolean).join(" "));
  },
  (error) => setText(at("found"), error.message),
);

// The server may want its key, which a plain link would not send.
async function save(kind) {
  try {
    const link = make("a", {href: URL.createObjectURL(await download(`credit.${kind}`)), download: `credit.${kind}`});
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    setText(at("found"), error.message);
  }
}

if (!Object.hasOwn(COLUMNS, list.asked.kind)) list.asked.kind = "hosts";
at("kind").value = list.asked.kind;
at("kind").addEventListener("change", (event) => list.change({kind: event.target.value, page: "1"}));
at("csv").addEventListener("click", () => save("csv"));
at("json").addEventListener("click", () => save("json"));
at("find").addEventListener("submit", (event) => event.preventDefault());
begin(() => list.refresh());
list.now();
