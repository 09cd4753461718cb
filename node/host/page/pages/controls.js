// What the owner sets: pauses, and limits. What stands in a field that was changed stays until it is applied or undone.
import {count} from "./format.js";
import {at, setText} from "./parts.js";
import {tell} from "./server.js";

const MB = 1e6;
const HOUR_S = 3600;
const sizeOf = (text) => (text ? `${text}MB` : "");
const rateOf = (text) => (text ? `${text}MB/s` : "");

// Each limit: how it stands in its field, and how the host is told what stands there.
const FIELDS = {
  max_memory: {shown: ({own_memory_bytes: n}) => (n ? String(n / MB) : ""), said: sizeOf},
  max_bandwidth_up: {shown: ({up_bytes_per_s: n}) => (n ? String(n / MB) : ""), said: rateOf},
  max_bandwidth_down: {shown: ({down_bytes_per_s: n}) => (n ? String(n / MB) : ""), said: rateOf},
  max_cpu_percent: {shown: ({cpu_percent: n}) => (n ? String(n) : ""), said: (text) => Number(text || 0)},
  schedule: {shown: ({settings}) => settings.schedule, said: (text) => text},
  only_when_idle: {shown: ({settings}) => settings.only_when_idle, said: (checked) => checked},
  on_battery: {shown: ({settings}) => settings.on_battery, said: (checked) => checked},
};
const BUTTONS = ["pause-hour", "pause", "resume", "leave"];
const inputOf = (name) => at(name.replaceAll("_", "-"));
const valueOf = (input) => (input.type === "checkbox" ? input.checked : input.value.trim());
let actKey = "";
let busy = false;
let live = false;
let known = null;
let isApplied = false;

const isChanged = (name) => known !== null && valueOf(inputOf(name)) !== FIELDS[name].shown(known);
const changed = () => Object.keys(FIELDS).filter((name) => !known?.fixed.includes(name) && isChanged(name));

function fill(input, value) {
  if (input.type === "checkbox") input.checked = value;
  else input.value = value;
}

function enable() {
  const any = changed().length > 0;
  at("apply").disabled = busy || !live || !any;
  at("undo").disabled = busy || !any;
  for (const id of BUTTONS) at(id).disabled = busy || !live;
}

function note(name, limits) {
  if (!limits.fixed.includes(name)) return "";
  return `Set by the host's command or its file, which win: start the host without it to set it here.`;
}

// Shows what holds now; fields that its owner has changed meanwhile are left alone.
export function showControls(told) {
  live = !told.problem;
  if (live) {
    const edited = new Set(isApplied ? [] : changed());
    isApplied = false;
    actKey = told.act_key;
    known = told.limits;
    for (const name of Object.keys(FIELDS)) {
      const input = inputOf(name);
      input.disabled = known.fixed.includes(name);
      setText(at(input.id + "-note"), note(name, known));
      if (!edited.has(name)) fill(input, FIELDS[name].shown(known));
    }
    const isPaused = told.availability.reasons.some(({name}) => name === "owner");
    at("resume").hidden = !isPaused;
    at("pause").hidden = at("pause-hour").hidden = isPaused;
  }
  enable();
}

function say(place, words, isBad) {
  at(place).classList.toggle("bad", isBad);
  setText(at(place), words);
}

// Has something done, one thing at a time, and says what came of it; whether it was done.
async function act(place, path, body, doing, done) {
  busy = true;
  enable();
  say(place, doing, false);
  try {
    say(place, done(await tell(path, body, {"X-Kilohive-Page": actKey})), false);
    return true;
  } catch (error) {
    say(place, error.name === "TimeoutError" ? "The host has not answered yet." : error.message, true);
    return false;
  } finally {
    busy = false;
    enable();
  }
}

const work = (path, body, doing, done) => act("work-said", path, body, doing, done);
const pause = (seconds) => work("pause", {seconds}, "Telling the host to pause.", () => "The host pauses.");

at("pause-hour").addEventListener("click", () => pause(HOUR_S));
at("pause").addEventListener("click", () => pause(null));
at("resume").addEventListener("click", () =>
  work("resume", {}, "Telling the host to work again.", ({reasons}) =>
    reasons.length ? `No longer paused by you, but ${reasons.join(" and ")}.` : "The host works again.",
  ),
);
at("leave").addEventListener("click", () =>
  work("leave", {}, "Telling the host to leave.", () => "The host hands its blocks over and ends."),
);

at("limits").addEventListener("input", enable);
at("undo").addEventListener("click", () => {
  for (const name of changed()) fill(inputOf(name), FIELDS[name].shown(known));
  say("limits-said", "", false);
  enable();
});
at("limits").addEventListener("submit", async (event) => {
  event.preventDefault();
  const names = changed();
  const limits = Object.fromEntries(names.map((name) => [name, FIELDS[name].said(valueOf(inputOf(name)))]));
  const words = names.length === 1 ? "The limit holds now." : `${count(names.length)} limits hold now.`;
  isApplied = await act("limits-said", "limits", {limits}, "Telling the host.", () => words);
});
