// The page of one peer: what it says of itself, its blocks beside the other replicas, and what a trainer reports.
import {Chart} from "./chart.js";
import {at, copyButton, fillFacts, fillPager, fillTable, make, setText} from "./parts.js";
import {UNKNOWN, bytes, count, duration, isKnown, loss, moment, number, shortId} from "./format.js";
import {layerLink} from "./links.js";
import {Asked} from "./list.js";
import {stateOf} from "./state.js";
import {begin} from "./shell.js";

const NOT_FOUND = 404,
  KEPT_POINTS = 900;
const seen = [[], []];
const speed = new Chart(at("speed"), {
  title: "Tokens per second, since this page was opened",
  x: "time",
  format: count,
  fromZero: true,
  empty: "Nothing has been seen yet.",
  series: [{name: "tokens per second"}],
});
const heldOut = new Chart(at("held-out"), {
  title: "Held-out loss over tokens, bits per byte",
  x: "tokens",
  format: loss,
  empty: "It has not evaluated yet.",
  series: [{name: "held-out loss"}],
});

const BLOCK_COLUMNS = [
  {name: "block", cell: ({block, layer}) => ({text: block, href: layerLink(layer)})},
  {name: "version", number: true, cell: ({version}) => count(version)},
  {name: "behind the newest", number: true, cell: ({behind}) => count(behind)},
  {name: "divergence", number: true, cell: ({divergence}) => number(divergence)},
  {name: "live replicas", number: true, cell: ({replicas}) => count(replicas)},
];
const LOAD_COLUMNS = [
  {name: "layer", cell: ({layer}) => ({text: "Layer " + layer, href: layerLink(layer)})},
  {name: "entropy, bits", number: true, cell: ({entropy}) => number(entropy)},
  {name: "load spread", number: true, cell: ({spread}) => number(spread)},
  {name: "dead experts", number: true, cell: ({dead}) => count(dead)},
];

const isHost = ({role}) => role === "host",
  isTrainer = ({role}) => role === "trainer";
const only = (value, wanted) => (wanted ? value : null);

function facts(peer) {
  const {report, trunk} = peer;
  return [
    ["State", [stateOf(peer)]],
    ["At", peer.endpoint || UNKNOWN],
    ["Others can call it", peer.reachability],
    ["Up", peer.up_s === null ? UNKNOWN : `${duration(peer.up_s)}, since ${moment(peer.started_s)}`],
    ["Runs", peer.software || UNKNOWN],
    ["Rank in its role", count(peer.rank)],
    [
      isTrainer(peer) ? "Tokens trained on" : "Tokens answered since its start",
      only(count(peer.tokens), isHost(peer) || isTrainer(peer)),
    ],
    [
      "Tokens per second",
      only(count(isTrainer(peer) && report ? report.tokens_per_s : peer.tokens_per_s), isHost(peer) || isTrainer(peer)),
    ],
    ["Tokens of the run, as it knows them", only(count(peer.run_tokens), isTrainer(peer))],
    ["Tokens that wait", only(count(peer.queue_tokens), isHost(peer))],
    ["Staleness, steps", only(number(peer.staleness), isHost(peer))],
    ["Exchanged and downloaded", bytes(peer.exchanged_bytes)],
    ["Blocks", only(peer.hosted || "none", isHost(peer))],
    ["Being downloaded, only stored", only(`${count(peer.joining)}, ${count(peer.stored)}`, isHost(peer))],
    [
      "Its trunk",
      only(
        trunk ? `version ${count(trunk.version)}, divergence ${number(trunk.divergence)}` : "not shared yet",
        isTrainer(peer),
      ),
    ],
    ["Steps", report ? count(report.step) : null],
    ["Training loss, bits per byte", report ? loss(report.train_bits_per_byte) : null],
    ["Calls answered, failed", report ? `${count(report.calls_ok)}, ${count(report.calls_failed)}` : null],
    ["Bytes of its calls", report ? bytes(report.wire_bytes) : null],
    ["Carries calls for others", peer.is_relay ? "yes" : null],
    ["Evaluators that it names", peer.evaluators ? count(peer.evaluators) : null],
  ];
}

function showReport(peer) {
  const {report} = peer;
  at("no-report").hidden = !isTrainer(peer) || report !== null;
  at("report").hidden = report === null;
  if (report === null) return;
  heldOut.set([report.evaluated_tokens, report.held_out_bits_per_byte]);
  heldOut.setLatest([report.held_out_bits_per_byte.at(-1) ?? null]);
  fillTable(
    at("load"),
    LOAD_COLUMNS,
    report.load_cv.map((spread, layer) => ({
      layer,
      spread,
      entropy: report.load_entropy_bits[layer],
      dead: report.dead_experts[layer],
    })),
  );
}

function show(peer) {
  const name = peer.role[0].toUpperCase() + peer.role.slice(1);
  document.title = `Kilohive: ${name.toLowerCase()} ${shortId(peer.peer_id)}`;
  setText(at("name"), `${name} ${shortId(peer.peer_id)}`);
  setText(at("gone"), "");
  fillFacts(at("facts"), facts(peer));
  const value = isTrainer(peer) && peer.report ? peer.report.tokens_per_s : peer.tokens_per_s;
  [Date.now() / 1000, value].forEach((part, index) => {
    seen[index].push(part);
    if (seen[index].length > KEPT_POINTS) seen[index].shift();
  });
  at("about").hidden = false;
  at("pace").hidden = !isHost(peer) && !isTrainer(peer);
  speed.set(seen.map((part) => [...part]));
  speed.setLatest([value]);
  showReport(peer);
  at("hosted").hidden = !isHost(peer);
  at("blocks-none").hidden = peer.replicas.total > 0;
  at("blocks-list").hidden = peer.replicas.total === 0;
  fillTable(at("blocks"), BLOCK_COLUMNS, peer.replicas.rows);
  fillPager(at("pager"), peer.replicas, "blocks", (page) => list.change({page: String(page)}));
}

const list = new Asked(
  "peer",
  {id: "", page: "1"},
  show,
  (error) =>
    setText(
      at("gone"),
      error.status === NOT_FOUND
        ? "This peer is not announced now: it has left, or its records have expired."
        : error.message,
    ),
);
setText(at("id"), list.asked.id);
at("copy").append(copyButton("Copy its id", () => list.asked.id));
begin(() => list.refresh());
list.now();
