// The page of the whole run: what is true now, how it came about, each layer, and how to take part.
import {HeatMap} from "./heat.js";
import {fillJoining} from "./joining.js";
import {fillCharts, showNow} from "./over_time.js";
import {at, fillTable, make, setText} from "./parts.js";
import {UNKNOWN, count, isKnown, large, loss, number} from "./format.js";
import {percent, plural, range, shortId, timeOfDay} from "./format.js";
import {layerLink, peerLink} from "./links.js";
import {begin} from "./shell.js";

const heat = new HeatMap(at("heat"));

function fillTiles({figures: f}) {
  const known = isKnown(f.held_out_bits_per_byte);
  const peers = Object.values(f.peers).reduce((sum, n) => sum + n, 0);
  const calls = isKnown(f.calls_ok) ? f.calls_ok + f.calls_failed : null;
  const tiles = {
    loss: [
      loss(f.held_out_bits_per_byte),
      known ? "bits/byte" : "",
      known ? `held-out text, at ${count(f.held_out_tokens)} tokens` : "no trainer has evaluated yet",
    ],
    speed: [large(f.tokens_per_s), "tokens/s", `hosts answer ${large(f.answered_tokens_per_s)} tokens/s`],
    run: [large(f.run_tokens), "tokens", `${percent(f.run_tokens, f.total_tokens)} of ${large(f.total_tokens)}`],
    alive: [
      count(f.experts_alive),
      `of ${count(f.experts)}`,
      `${count(f.blocks - f.blocks_lost)} of ${count(f.blocks)} blocks are live`,
    ],
    peers: [
      count(peers),
      peers === 1 ? "peer" : "peers",
      `${plural(f.peers.host, "host")}, ${plural(f.peers.trainer, "trainer")}` +
        (f.paused ? `, ${count(f.paused)} paused` : ""),
    ],
    failed: [
      large(f.calls_failed),
      calls === null ? "" : "calls",
      calls === null ? "no trainer has reported yet" : `${percent(f.calls_failed, calls)} of ${large(calls)} to hosts`,
    ],
  };
  for (const [name, [value, unit, words]] of Object.entries(tiles)) {
    const tile = at("tile-" + name);
    setText(tile.querySelector(".value"), value);
    setText(tile.querySelector(".unit"), unit);
    setText(tile.querySelector(".faint"), words);
  }
}

// Each item is a list of texts and links, and stays as it is for as long as it is true.
function itemsOf({figures: f, silent, lost, problem}) {
  const items = [];
  if (problem) items.push([`The DHT was not seen lately, so numbers may be old: ${problem}`]);
  if (f.blocks_lost) {
    const have = f.blocks_lost === 1 ? "has" : "have";
    items.push([`${count(f.blocks_lost)} of ${plural(f.blocks, "block")} ${have} no live replica: ${lost}`]);
  }
  for (const {peer_id, role, heard_s} of silent) {
    const since = ` has not been heard since ${timeOfDay(f.taken_s - heard_s)}.`;
    items.push([`The ${role} `, make("a", {href: peerLink(peer_id)}, shortId(peer_id)), since]);
  }
  const more = f.silent - silent.length;
  if (more > 0)
    items.push([
      `${plural(more, "more peer")} not been heard lately.`.replace(" not", more === 1 ? " has not" : " have not"),
    ]);
  return items;
}

function fillAttention(overview) {
  const items = itemsOf(overview);
  const words = items.map((parts) => parts.map((part) => part.textContent ?? part).join("")).join("\n");
  at("attention").hidden = !items.length;
  if (at("attention").dataset.words === words) return;
  at("attention").dataset.words = words;
  at("attention-list").replaceChildren(...items.map((parts) => make("li", {}, ...parts)));
}

const LAYER_COLUMNS = [
  {name: "layer", cell: ({layer}) => ({text: "Layer " + layer, href: layerLink(layer)})},
  {
    name: "live blocks",
    number: true,
    cell: (row) => ({
      text: `${count(row.live)} of ${count(row.blocks)}`,
      className: row.live < row.blocks ? "bad" : "",
    }),
  },
  {name: "joining", number: true, cell: ({joining}) => (joining ? count(joining) : UNKNOWN)},
  {
    name: "version",
    number: true,
    cell: ({version_min, version_max}) => (isKnown(version_min) ? range(version_min, version_max) : UNKNOWN),
  },
  {name: "gap", number: true, cell: ({gap}) => count(gap)},
  {name: "divergence", number: true, cell: ({divergence}) => number(divergence)},
  {name: "hosts", number: true, cell: ({hosts}) => count(hosts)},
  {name: "queue", number: true, cell: ({queue_tokens}) => count(queue_tokens)},
  {name: "entropy, bits", number: true, cell: ({load_entropy_bits}) => number(load_entropy_bits)},
  {name: "load spread", number: true, cell: ({load_cv}) => number(load_cv)},
  {name: "dead experts", number: true, cell: ({dead_experts}) => count(dead_experts)},
];

function fillLayers({layers, cells, figures}) {
  const names = Object.keys(layers);
  const n = names.length ? layers[names[0]].length : 0;
  const rows = Array.from({length: n}, (_, layer) =>
    Object.fromEntries([["layer", layer], ...names.map((name) => [name, layers[name][layer]])]),
  );
  heat.set(cells, figures.target_replicas, 0, rows[0]?.blocks ?? 0);
  fillTable(at("layers"), LAYER_COLUMNS, rows);
}

function aboutOf(about, {target_replicas: target}) {
  const experts = `${count(about.experts_per_layer)} experts in blocks of ${count(about.experts_per_block)}`;
  const gate = `${count(about.experts_per_token)} per token by ${about.gate}, ${about.codec} on the wire`;
  return `${plural(about.layers, "layer")} of ${experts}; ${gate}; ${plural(target, "replica")} of each block wanted`;
}

begin((overview) => {
  setText(at("about"), aboutOf(overview.about, overview.figures));
  fillTiles(overview);
  fillAttention(overview);
  fillLayers(overview);
  showNow(overview.figures);
});
fillCharts();
fillJoining();
