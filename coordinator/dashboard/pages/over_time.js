// How the run came about: a chart for each figure of its history, and held-out loss over tokens.
import {Chart, rates, withGaps} from "./chart.js";
import {at, make} from "./parts.js";
import {UNKNOWN, bytes, count, isKnown, loss, number} from "./format.js";
import {ask} from "./server.js";

const AGAIN_MS = {hour: 10000, day: 60000, week: 300000, all: 300000};
const NO_REPORT = "No trainer has reported yet.";
const perMinute = (value) => (isKnown(value) ? number(value) + " a minute" : UNKNOWN);
const perSecond = (value) => (isKnown(value) ? bytes(value) + "/s" : UNKNOWN);
const bits = (value) => (isKnown(value) ? number(value) + " bits" : UNKNOWN);

// Each chart: its title, its lines with the history's column or how to get it, and what is true now.
const CHARTS = [
  {
    id: "tokens",
    title: "Tokens per second",
    fromZero: true,
    format: number,
    empty: NO_REPORT,
    series: [
      ["trained", "tokens_per_s"],
      ["answered by hosts", "answered_tokens_per_s"],
    ],
    now: (f) => [f.tokens_per_s, f.answered_tokens_per_s],
  },
  {
    id: "peers",
    title: "Peers",
    fromZero: true,
    format: count,
    empty: "Nobody has been seen yet.",
    series: [
      ["hosts", "hosts"],
      ["trainers", "trainers"],
      ["coordinators", "coordinators"],
      ["lighthouses", "lighthouses"],
    ],
    now: ({peers}) => [peers.host, peers.trainer, peers.coordinator, peers.lighthouse],
  },
  {
    id: "train-loss",
    title: "Training loss, bits per byte",
    format: loss,
    empty: NO_REPORT,
    series: [["training loss", "train_bits_per_byte"]],
    now: (f) => [f.train_bits_per_byte],
  },
  {
    id: "alive",
    title: "Experts alive",
    fromZero: true,
    format: count,
    empty: "Nobody has been seen yet.",
    series: [["experts alive", "experts_alive"]],
    now: (f) => [f.experts_alive],
  },
  {
    id: "spread",
    title: "Load spread of experts",
    fromZero: true,
    format: number,
    empty: NO_REPORT,
    series: [["standard deviation over mean", "load_cv"]],
    now: (f) => [f.load_cv],
  },
  {
    id: "entropy",
    title: "Gate entropy",
    format: bits,
    empty: NO_REPORT,
    series: [["mean of layers", "load_entropy_bits"]],
    now: (f) => [f.load_entropy_bits],
  },
  {
    id: "dead",
    title: "Dead experts",
    fromZero: true,
    format: count,
    empty: NO_REPORT,
    series: [["not chosen in 100 steps", "dead_experts"]],
    now: (f) => [f.dead_experts],
  },
  {
    id: "staleness",
    title: "Staleness of gradients, steps",
    fromZero: true,
    format: number,
    empty: "No host has answered a gradient yet.",
    series: [["mean of hosts", "staleness"]],
    now: (f) => [f.staleness],
  },
  {
    id: "divergence",
    title: "Divergence of replicas",
    fromZero: true,
    format: number,
    empty: "No two replicas have been compared yet.",
    series: [
      ["blocks, largest", "divergence"],
      ["trunks, largest", "trunk_divergence"],
    ],
    now: (f) => [f.divergence, f.trunk_divergence],
  },
  {
    id: "gap",
    title: "Largest gap between replicas, steps",
    fromZero: true,
    format: count,
    empty: "No block has two replicas yet.",
    series: [["newest to oldest", "version_gap"]],
    now: (f) => [f.version_gap],
  },
  {
    id: "queue",
    title: "Tokens that wait at hosts",
    fromZero: true,
    format: count,
    empty: "Nobody has been seen yet.",
    series: [["tokens", "queue_tokens"]],
    now: (f) => [f.queue_tokens],
  },
  {
    id: "failed",
    title: "Calls that failed",
    fromZero: true,
    format: perMinute,
    empty: NO_REPORT,
    series: [["failed", (t, c) => rates(t, c.calls_failed).map((rate) => (rate === null ? null : 60 * rate))]],
    now: null,
  },
  {
    id: "bytes",
    title: "Bytes moved",
    fromZero: true,
    format: perSecond,
    empty: NO_REPORT,
    tick: bytes,
    least: 1000,
    series: [
      ["trainers' calls", (t, c) => rates(t, c.wire_bytes)],
      ["averaging and downloads", (t, c) => rates(t, c.exchanged_bytes)],
    ],
    now: null,
  },
];

const charts = new Map();
for (const about of CHARTS) {
  const figure = make("figure", {id: "chart-" + about.id});
  at("charts").append(figure);
  charts.set(about.id, new Chart(figure, {...about, x: "time", series: about.series.map(([name]) => ({name}))}));
}
const heldOut = new Chart(at("held-out"), {
  title: "Held-out loss over tokens, bits per byte",
  x: "tokens",
  format: loss,
  empty: "No trainer has evaluated yet.",
  series: [{name: "held-out loss"}],
});
// What is true now, beside the charts' headings.
export function showNow(figures) {
  CHARTS.forEach(({id, now}) => now && charts.get(id).setLatest(now(figures)));
  heldOut.setLatest([figures.held_out_bits_per_byte]);
}

let span = "hour";
let coming = 0;

export async function fillCharts() {
  clearTimeout(coming);
  coming = setTimeout(fillCharts, AGAIN_MS[span]);
  if (document.hidden) return;
  const asked = span;
  const told = await ask("history", {span}).catch(() => null);
  if (told === null || asked !== span) return;
  const {t_s: times, figures, evaluations} = told;
  const steps = times
    .slice(1)
    .map((time, index) => time - times[index])
    .sort((a, b) => a - b);
  const usual = steps[Math.floor(steps.length / 2)] ?? 10;
  for (const {id, series, now} of CHARTS) {
    const columns = series.map(([, source]) => (typeof source === "string" ? figures[source] : source(times, figures)));
    charts.get(id).set(withGaps(times, columns, usual));
    if (now === null) charts.get(id).setLatest(columns.map((column) => column.at(-1) ?? null));
  }
  heldOut.set([evaluations.tokens, evaluations.bits_per_byte]);
}

at("span").addEventListener("change", (event) => {
  span = event.target.value;
  fillCharts();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) fillCharts();
});
