// The page of one layer: its blocks with their replicas, and the load of its experts as each trainer sees it.
import {HeatMap} from "./heat.js";
import {at, fillFacts, fillPager, fillTable, setText} from "./parts.js";
import {UNKNOWN, count, isKnown, number, range, shortId} from "./format.js";
import {layerLink, peerLink} from "./links.js";
import {Asked} from "./list.js";
import {begin} from "./shell.js";

const heat = new HeatMap(at("heat"));

const BLOCK_COLUMNS = [
  {name: "block", cell: ({block}) => block},
  {name: "replicas", number: true, cell: ({replicas}) => ({text: count(replicas), className: replicas ? "" : "bad"})},
  {
    name: "version",
    number: true,
    cell: ({version_min, version_max}) => (isKnown(version_min) ? range(version_min, version_max) : UNKNOWN),
  },
  {name: "gap", number: true, cell: ({gap}) => count(gap)},
  {name: "divergence", number: true, cell: ({divergence}) => number(divergence)},
  {name: "longest queue", number: true, cell: ({queue_tokens}) => count(queue_tokens)},
  {
    name: "hosts' tokens/s",
    number: true,
    cell: ({tokens_per_s, replicas}) => (replicas ? count(tokens_per_s) : UNKNOWN),
  },
  {
    name: "hosts",
    cell: ({hosts, replicas}) =>
      hosts.length
        ? [
            ...hosts.map((id) => ({text: shortId(id), href: peerLink(id), title: id, className: "mono"})),
            ...(replicas > hosts.length ? [`and ${count(replicas - hosts.length)} more`] : []),
          ]
        : UNKNOWN,
  },
];
const TRAINER_COLUMNS = [
  {
    name: "trainer",
    cell: ({peer_id}) => ({text: shortId(peer_id), href: peerLink(peer_id), title: peer_id, className: "mono"}),
  },
  {name: "entropy, bits", number: true, cell: ({load_entropy_bits}) => number(load_entropy_bits)},
  {name: "load spread", number: true, cell: ({load_cv}) => number(load_cv)},
  {name: "dead experts", number: true, cell: ({dead_experts}) => count(dead_experts)},
];

function show({figures: f, cells, blocks, trainers, n_trainers, target_replicas, experts_per_block}) {
  setText(at("problem"), "");
  fillFacts(at("facts"), [
    ["Live blocks", `${count(f.live)} of ${count(f.blocks)}, of ${count(experts_per_block)} experts each`],
    ["Hosts", count(f.hosts)],
    ["Being downloaded", count(f.joining)],
    ["Version", isKnown(f.version_min) ? range(f.version_min, f.version_max) : UNKNOWN],
    ["Largest gap between replicas", count(f.gap)],
    ["Largest divergence", number(f.divergence)],
    ["Tokens that wait at its hosts", count(f.queue_tokens)],
    ["Tokens per second of its hosts", count(f.tokens_per_s)],
    ["Entropy of the load, bits", number(f.load_entropy_bits)],
    ["Load spread", number(f.load_cv)],
    ["Dead experts", count(f.dead_experts)],
  ]);
  heat.set(cells, target_replicas, f.layer, f.blocks);
  fillTable(at("blocks"), BLOCK_COLUMNS, blocks.rows);
  fillPager(at("pager"), blocks, "blocks", (page) => list.change({page: String(page)}));
  at("trainers-none").hidden = n_trainers > 0;
  at("trainers-list").hidden = n_trainers === 0;
  setText(
    at("trainers-more"),
    n_trainers > trainers.length ? `and ${count(n_trainers - trainers.length)} more trainers` : "",
  );
  fillTable(at("trainers"), TRAINER_COLUMNS, trainers);
}

const list = new Asked(
  "layer",
  {layer: "0", page: "1"},
  show,
  (error) => setText(at("problem"), error.message),
);
const layer = Number(list.asked.layer);
document.title = `Kilohive: layer ${list.asked.layer}`;
setText(at("name"), "Layer " + list.asked.layer);
if (layer > 0) at("before").href = layerLink(layer - 1);
begin(({about}) => {
  at("before").hidden = layer <= 0;
  at("after").hidden = layer >= about.layers - 1;
  at("after").href = layerLink(layer + 1);
  list.refresh();
});
list.now();
