// How to take part: the invite, and commands that can be copied.
import {at, copyButton, make, setText} from "./parts.js";
import {moment} from "./format.js";
import {ask} from "./server.js";

const AGAIN_MS = 5000;

function wordsOf(told) {
  if (told.closed) return "This run is closed: ask its owner for the invite.";
  if (told.expired) return "The invite that this page was started with has expired: ask the run's owner for a new one.";
  const until = told.expires_s ? ` The invite holds until ${moment(told.expires_s)}.` : "";
  return "A machine of yours can hold some of the experts. It needs no account, and Ctrl+C leaves." + until;
}

function wayOf({name, about, text, wide}) {
  const heading = make(
    "div",
    {class: "row"},
    make("h3", {}, name),
    copyButton(`Copy ${wide ? "the invite" : "for " + name}`, () => text),
  );
  const words = make("pre", {tabindex: "0", role: "region", "aria-label": name}, text);
  return make("div", {class: wide ? "way card all" : "way card"}, heading, make("p", {class: "faint"}, about), words);
}

export async function fillJoining() {
  const told = await ask("join").catch(() => null);
  if (told === null) return void setTimeout(fillJoining, AGAIN_MS);
  setText(at("join-words"), wordsOf(told));
  const about = "For --join of any command, on any machine:";
  const invite = told.invite ? [{name: "Invite", about, text: told.invite, wide: true}] : [];
  at("ways").replaceChildren(...[...invite, ...told.ways].map(wayOf));
}
