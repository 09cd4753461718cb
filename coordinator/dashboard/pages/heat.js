// Replicas of each block as squares, layer under layer.
import {make, setText} from "./parts.js";
import {count, plural} from "./format.js";

const LARGEST = 28,
  HIGHEST = 360,
  SMALLEST = 3,
  WITH_DIGITS = 15,
  GAP = 1,
  LABEL = 34;
const KINDS = ["lost", "few", "full", "more"];
const dark = matchMedia("(prefers-color-scheme: dark)");

export function kindOf(character, target) {
  const replicas = character === "+" ? 10 : Number(character);
  if (replicas === 0) return "lost";
  return replicas < target ? "few" : replicas === target ? "full" : "more";
}

export class HeatMap {
  constructor(place) {
    this.canvas = make("canvas", {class: "heat", role: "img"});
    this.words = make("p", {class: "faint", "aria-hidden": "true"});
    this.keys = make("div", {class: "keys"}, ...KINDS.map((kind) => make("span", {class: "key box " + kind})));
    place.append(this.canvas, this.keys, this.words);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => setText(this.words, this.usual));
    dark.addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(place);
  }

  // `cells`: {group, layers: [text]}; `first`: the number of the first layer; `blocks`: how many a layer has.
  set(cells, target, first, blocks) {
    Object.assign(this, {cells, target, first, blocks});
    this.usual =
      cells.group > 1
        ? `A square stands for ${count(cells.group)} neighbouring blocks: the fewest replicas of them.`
        : "A square is a block.";
    if (!this.words.textContent || this.words.textContent.startsWith("A square")) setText(this.words, this.usual);
    const names = [
      "no replica",
      target > 1 ? `fewer than ${target}` : null,
      plural(target, "replica") + ", as wanted",
      "more",
    ];
    names.forEach((name, index) => {
      this.keys.children[index].hidden = name === null;
      setText(this.keys.children[index], name ?? "");
    });
    this.canvas.setAttribute("aria-label", this.described());
    this.draw();
  }

  described() {
    const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
    for (const text of this.cells.layers) for (const character of text) counts[kindOf(character, this.target)] += 1;
    const words = KINDS.map((kind) => `${kind}: ${count(counts[kind])}`).join(", ");
    return `Replicas of each block. ${words} squares. The table below has the numbers.`;
  }

  draw() {
    if (!this.cells || !this.canvas.clientWidth) return;
    const width = this.canvas.clientWidth,
      longest = Math.max(1, ...this.cells.layers.map((text) => text.length));
    this.fit(width - LABEL, longest);
    const height = Math.max(1, this.cells.layers.length * this.step),
      scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.height = height + "px";
    const brush = this.canvas.getContext("2d");
    brush.scale(scale, scale);
    this.paint(brush);
  }

  // The largest squares with which each layer is one line, or all of them are not too high.
  fit(width, longest) {
    for (let size = LARGEST; size >= SMALLEST; size -= 1) {
      this.size = size;
      this.perLine = Math.max(1, Math.floor(width / this.size));
      const lines = Math.ceil(longest / this.perLine);
      this.step = lines * this.size + (this.size > 8 ? 6 : 2);
      if (lines === 1 || this.cells.layers.length * this.step <= HIGHEST) return;
    }
  }

  paint(brush) {
    const colors = Object.fromEntries(
      KINDS.map((kind, index) => [kind, getComputedStyle(this.keys.children[index], "::before").backgroundColor]),
    );
    const ink = getComputedStyle(this.words).color;
    brush.textBaseline = "middle";
    this.cells.layers.forEach((text, row) => {
      const top = row * this.step;
      if (this.step >= 11 || row % Math.ceil(11 / this.step) === 0) {
        brush.fillStyle = ink;
        brush.textAlign = "right";
        brush.font = "12px system-ui, sans-serif";
        brush.fillText(String(this.first + row), LABEL - 8, top + Math.max(6, this.size / 2));
      }
      [...text].forEach((character, index) => {
        const x = LABEL + (index % this.perLine) * this.size,
          y = top + Math.floor(index / this.perLine) * this.size,
          side = this.size - GAP;
        const kind = kindOf(character, this.target);
        brush.fillStyle = colors[kind];
        brush.fillRect(x, y, side, side);
        if (this.size < WITH_DIGITS) return;
        brush.fillStyle = kind === "lost" || (kind === "more" && !dark.matches) ? "#fff" : "#10201d";
        brush.textAlign = "center";
        brush.font = "600 11px system-ui, sans-serif";
        brush.fillText(character, x + side / 2, y + side / 2 + 0.5);
      });
    });
  }

  point(event) {
    const row = Math.floor(event.offsetY / this.step),
      x = Math.floor((event.offsetX - LABEL) / this.size);
    const index = Math.floor((event.offsetY - row * this.step) / this.size) * this.perLine + x,
      character = this.cells.layers[row]?.[index];
    if (x < 0 || x >= this.perLine || character === undefined) return setText(this.words, this.usual);
    const from = index * this.cells.group,
      to = Math.min(this.blocks, from + this.cells.group) - 1;
    const what = from === to ? `block ${count(from)}` : `blocks ${count(from)} to ${count(to)}`;
    const replicas = character === "+" ? "10 replicas or more" : plural(Number(character), "replica");
    setText(this.words, `Layer ${this.first + row}, ${what}: ${replicas}`);
  }
}
