// The page of one machine: what it does now, what it takes, and how its log ends. What can be set is in controls.js.
import {Chart} from "./chart.js";
import {showControls} from "./controls.js";
import {UNKNOWN, bytes, count, duration, isKnown, large, moment, number, plural, timeOfDay} from "./format.js";
import {showLive} from "./live.js";
import {at, fillTable, make, setText} from "./parts.js";

const UNAUTHORIZED = 401,
  KEPT_POINTS = 900;
const rate = (value) => (isKnown(value) ? bytes(value) + "/s" : UNKNOWN);
const percent = (value) => (isKnown(value) ? `${number(value)} %` : UNKNOWN);

const times = [];
const EMPTY = "Nothing has been seen yet.";
const charts = [
  chart("speed", "Tokens per second", count, [["tokens per second", (told) => told.work.tokens_per_s]]),
  chart("cpu", "Processor, of one core", percent, [["processor", (told) => told.rates.cpu_percent]]),
  chart("memory", "Memory", bytes, [["memory", (told) => told.use.memory_bytes]], bytes),
  chart(
    "bandwidth",
    "Bytes per second",
    rate,
    [
      ["sent", (told) => told.rates.up_bytes_per_s],
      ["received", (told) => told.rates.down_bytes_per_s],
    ],
    bytes,
  ),
];

function chart(place, title, format, series, tick) {
  const names = series.map(([name]) => ({name}));
  const about = {title, x: "time", format, fromZero: true, empty: EMPTY, series: names, tick};
  return {drawn: new Chart(at(place), about), values: series.map(() => []), read: series.map(([, read]) => read)};
}

function fillCharts(told) {
  times.push(told.now_s);
  if (times.length > KEPT_POINTS) times.shift();
  for (const {drawn, values, read} of charts) {
    const latest = read.map((from) => from(told));
    latest.forEach((value, index) => {
      values[index].push(value);
      if (values[index].length > KEPT_POINTS) values[index].shift();
    });
    drawn.set([[...times], ...values.map((column) => [...column])]);
    drawn.setLatest(latest);
  }
}

const limited = (value, format) => (isKnown(value) ? `at most ${format(value)}` : "no limit");

function tilesOf({work, credit, held, use, rates, limits, now_s, started_s}) {
  const onTheWay = held.joining ? `, ${count(held.joining)} on the way` : "";
  return {
    speed: [large(work.tokens_per_s), "tokens/s", `${plural(work.tokens, "token")} in ${duration(now_s - started_s)}`],
    answered: [
      large(credit?.answered),
      "pairs",
      credit ? `of a token and an expert, for ${plural(credit.trainers, "trainer")}` : "nothing has been counted yet",
    ],
    credit: [large(credit?.confirmed), credit ? "pairs confirmed" : "", creditWords(credit)],
    held: [
      count(held.experts),
      held.experts === 1 ? "expert" : "experts",
      `in ${plural(held.serving, "block")} of at most ${count(limits.max_blocks)}${onTheWay}`,
    ],
    cpu: [isKnown(rates.cpu_percent) ? number(rates.cpu_percent) : UNKNOWN, "% of a core", limited(limits.cpu_percent, percent)],
    memory: [bytes(use.memory_bytes), "", limited(limits.memory_bytes, bytes)],
    device: [bytes(use.device_bytes), "", limited(limits.device_bytes, bytes)],
    up: [rate(rates.up_bytes_per_s), "", `${bytes(use.sent_bytes)} so far, ${limited(limits.up_bytes_per_s, rate)}`],
    down: [
      rate(rates.down_bytes_per_s),
      "",
      `${bytes(use.received_bytes)} so far, ${limited(limits.down_bytes_per_s, rate)}`,
    ],
  };
}

function creditWords(credit) {
  if (!credit) return "no trainer has confirmed anything yet";
  const waiting = credit.waiting ? `; ${large(credit.waiting)} wait` : "";
  const since = isKnown(credit.first_s) ? `; the first on ${moment(credit.first_s)}` : "";
  return `${large(credit.confirmed_today)} today${waiting}${since}`;
}

function fillTiles(told) {
  at("tile-device").hidden = !isKnown(told.use.device_bytes);
  for (const [name, [value, unit, words]] of Object.entries(tilesOf(told))) {
    const tile = at("tile-" + name);
    setText(tile.querySelector(".value"), value);
    setText(tile.querySelector(".unit"), unit);
    setText(tile.querySelector(".faint"), words);
  }
}

const aboutOf = ({reached, run_id, device, software, started_s}) =>
  `${reached} It computes on ${device} for the run ${run_id}, with ${software}, since ${moment(started_s)}.`;

function fillAttention(problem, {reasons, unknown} = {reasons: [], unknown: []}) {
  const items = [
    ...(problem ? [problem] : []),
    ...reasons.map(({why, since_s}) => `It does not work because ${why}, since ${moment(since_s)}.`),
    ...unknown.map((sentence) => `On this machine, ${sentence}.`),
  ];
  const words = items.join("\n");
  at("attention").hidden = !items.length;
  if (at("attention").dataset.words === words) return;
  at("attention").dataset.words = words;
  at("attention-list").replaceChildren(...items.map((item) => make("li", {}, item)));
}

const BLOCK_COLUMNS = [
  {name: "block", cell: ({block}) => block},
  {name: "experts", number: true, cell: ({experts}) => count(experts)},
  {name: "version", number: true, cell: ({version}) => count(version)},
];

function fillBlocks({blocks}) {
  at("blocks-none").hidden = blocks.length > 0;
  at("blocks-list").hidden = !blocks.length;
  fillTable(at("blocks"), BLOCK_COLUMNS, blocks);
}

function fillLog(lines) {
  const log = at("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
  setText(log, lines.map(({t_s, level, text}) => `${timeOfDay(t_s)} ${level} ${text}`).join("\n") || "It is empty.");
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

showLive(
  (told) => {
    setText(at("sentence"), told.sentence);
    fillAttention(told.problem, told.availability);
    showControls(told);
    if (told.problem) return;
    setText(at("about"), aboutOf(told));
    fillTiles(told);
    fillCharts(told);
    fillBlocks(told.held);
    fillLog(told.log);
  },
  (error) => {
    showControls({problem: error.message});
    if (error.status !== UNAUTHORIZED) return null;
    setText(at("sentence"), "Open the address that the host has printed: this browser is not known here.");
    return "locked";
  },
);
