// node page_in_node.mjs PAGE URL KEY ACTION: runs the page's own script against a real server, over a DOM of the few
// things that it uses, and prints what a person would then see as JSON. ACTION: write, stop, escape.
import fs from "node:fs";

const [page, url, key, action] = process.argv.slice(2);
const html = fs.readFileSync(page, "utf8");

class Element {
  constructor() {
    Object.assign(this, {children: [], words: "", className: "", hidden: false, disabled: false, value: "", heard: {}});
    const names = new Set();
    this.classList = {add: (name) => names.add(name), remove: (name) => names.delete(name)};
  }
  set textContent(words) { this.words = String(words); this.children = []; }
  get textContent() { return this.words + this.children.map((child) => child.textContent).join(""); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.words = ""; this.children = children; }
  addEventListener(name, hear) { (this.heard[name] ||= []).push(hear); }
  fire(name, event = {}) { for (const hear of this.heard[name] || []) hear({preventDefault() {}, ...event}); }
}

const parts = Object.fromEntries([...html.matchAll(/\bid="([a-z-]+)"/g)].map((found) => [found[1], new Element()]));
const page_of = new Element();
page_of.getElementById = (id) => parts[id];
page_of.createElement = () => new Element();
page_of.createTextNode = (words) => Object.assign(new Element(), {words});

async function until(isSo) {
  while (!isSo()) await new Promise((resume) => setTimeout(resume, 5));
}

parts.prompt.value = "<b>The ";
parts.temperature.value = "0";
parts["max-tokens"].value = action === "write" ? "12" : "100000";
parts["key-label"].hidden = true;
new Function("document", "fetch", /<script>(.*?)<\/script>/s.exec(html)[1])(page_of, (path, how) => fetch(url + path, how));
await until(() => parts.model.textContent || parts.status.textContent);
const atFirst = {asksForKey: !parts["key-label"].hidden, status: parts.status.textContent};
if (key) {
  parts.key.value = key;
  parts.key.fire("change");
  await until(() => parts.model.textContent);
}
parts.ask.fire("submit");
if (action !== "write") {
  await until(() => parts.text.children.length > 3);
  if (action === "stop") parts.stop.fire("click");
  else page_of.fire("keydown", {key: "Escape"});
}
await until(() => !parts.write.disabled);
parts.text.fire("keydown", {key: "End"});
const last = parts["token-words"].textContent;
parts.text.fire("keydown", {key: "ArrowLeft"});
const rows = (body) => body.children.map((row) => row.children.map((cell) => cell.textContent));
console.log(JSON.stringify({
  atFirst,
  model: parts.model.textContent,
  health: parts.health.textContent,
  status: parts.status.textContent,
  isBad: parts.status.className === "bad",
  text: parts.text.textContent,
  nTokens: parts.text.children.length - 1,
  last,
  beforeLast: parts["token-words"].textContent,
  peers: rows(parts["token-peers"]),
  total: rows(parts["total-peers"]),
}));
