// A line chart with its heading, the value under the pointer, and the same numbers as a table.
import uPlot from "./vendor/uPlot.esm.js";
import {fillTable, make, setText} from "./parts.js";
import {count, duration, isKnown, moment, short} from "./format.js";

const TABLE_ROWS = 24;
const HEIGHT = 176;
const LEAST_RANGE = 0.02;
const LEAST_S = 60,
  WITH_SECONDS_S = 240,
  DAY_S = 86400;
const COLORS = ["first", "second", "third", "fourth"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = (element, name) => getComputedStyle(element).getPropertyValue(name).trim();

// What a custom property with light-dark() comes to is told by a property that uses it.
function colorOf(element, name) {
  const probe = make("span");
  probe.style.color = `var(--${name})`;
  element.append(probe);
  const found = color(probe, "color");
  probe.remove();
  return found;
}

export class Chart {
  // `place`: a figure. `about`: {title, series: [{name}], format, x: "time" or "tokens", empty: words for no data,
  // fromZero, tick: how its axis is written, least: how high the scale of nothing but zeros is}.
  constructor(place, about) {
    this.about = about;
    this.data = [[], ...about.series.map(() => [])];
    this.latest = about.series.map(() => null);
    this.now = make("span", {class: "now"});
    this.plot = make("div", {class: "plot", role: "img"});
    this.table = make("table", {}, make("caption", {class: "unseen"}, about.title));
    const scroll = make(
      "div",
      {class: "scroll low", tabindex: "0", role: "region", "aria-label": about.title + ", as a table"},
      this.table,
    );
    this.details = make(
      "details",
      {class: "details"},
      make("summary", {}, "As a table", make("span", {class: "unseen"}, ": " + about.title)),
      scroll,
    );
    place.classList.add("card");
    this.keys = about.series.map(({name}, index) =>
      make("span", {class: "key " + COLORS[index]}, name + " ", make("b")),
    );
    const keys = this.keys.length > 1 ? [make("div", {class: "keys"}, ...this.keys)] : [];
    place.append(make("figcaption", {}, make("h3", {}, about.title), this.now), this.plot, ...keys, this.details);
    this.details.addEventListener("toggle", () => this.fill());
    dark.addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(this.plot);
    this.rebuild();
  }

  // `data`: times or tokens, and a list of values or nulls for each series, all of one length.
  set(data) {
    this.data = data;
    if (this.isEmpty !== !this.hasValues()) this.rebuild();
    else if (this.chart) this.chart.setData(data);
    this.describe();
    this.fill();
  }

  // What is true now, which may be newer than the last point.
  setLatest(values) {
    this.latest = values;
    this.tell(this.latest);
  }

  hasValues() {
    return this.data.slice(1).some((values) => values.some(isKnown));
  }

  tell(values, x) {
    const words = values.map((value) => this.about.format(value)),
      where = x === undefined ? "" : this.place(x);
    if (words.length > 1) {
      words.forEach((word, index) => setText(this.keys[index].lastChild, word));
      setText(this.now, where);
    } else setText(this.now, words[0] + (where && " at " + where));
  }

  place(x) {
    return this.about.x === "time" ? moment(x) : count(x) + " tokens";
  }

  describe() {
    const [xs, ...series] = this.data;
    const parts = this.about.series.map(({name}, index) => {
      const known = series[index].filter(isKnown);
      const [low, high, last] = [Math.min(...known), Math.max(...known), known.at(-1)].map(this.about.format);
      return known.length ? `${name}: from ${low} to ${high}, last ${last}` : `${name}: nothing`;
    });
    const span = this.about.x === "time" ? `over ${duration(xs.at(-1) - xs[0])}` : `up to ${count(xs.at(-1))} tokens`;
    this.plot.setAttribute(
      "aria-label",
      this.isEmpty ? `${this.about.title}: ${this.about.empty}` : `${this.about.title} ${span}. ${parts.join("; ")}`,
    );
  }

  fill() {
    if (!this.details.open) return;
    const [xs, ...series] = this.data;
    const every = Math.max(1, Math.ceil(xs.length / TABLE_ROWS));
    const rows = xs
      .map((_, index) => index)
      .filter((index) => (xs.length - 1 - index) % every === 0)
      .reverse();
    const columns = [
      {
        name: this.about.x === "time" ? "time" : "tokens",
        cell: (row) => (this.about.x === "time" ? moment(xs[row]) : count(xs[row])),
      },
      ...this.about.series.map(({name}, index) => ({
        name,
        number: true,
        cell: (row) => this.about.format(series[index][row]),
      })),
    ];
    fillTable(this.table, columns, rows);
  }

  resize() {
    if (this.chart && this.plot.clientWidth) this.chart.setSize({width: this.plot.clientWidth, height: HEIGHT});
  }

  rebuild() {
    this.chart?.destroy();
    this.chart = null;
    this.isEmpty = !this.hasValues();
    this.plot.replaceChildren();
    if (this.isEmpty) this.plot.append(make("p", {class: "empty"}, this.about.empty));
    else this.chart = new uPlot(this.options(), this.data, this.plot);
    this.describe();
  }

  options() {
    const paint = (name) => colorOf(this.plot, name);
    const axis = {
      stroke: paint("faint"),
      grid: {stroke: paint("line"), width: 1},
      ticks: {show: false},
      font: "12px system-ui, sans-serif",
    };
    const isTime = this.about.x === "time";
    return {
      width: this.plot.clientWidth || 320,
      height: HEIGHT,
      legend: {show: false},
      cursor: {y: false, drag: {x: false, y: false}},
      padding: [8, 22, 0, 0],
      scales: {
        x: {time: isTime, range: () => this.across()},
        y: {range: (_, low, high) => this.range(low, high)},
      },
      axes: [
        {
          ...axis,
          size: 26,
          space: (_, __, low, high) => (isTime && high - low < WITH_SECONDS_S ? 76 : 44),
          values: (_, ticks, __, ___, apart) => ticks.map((tick) => (isTime ? timeTick : numberTick)(tick, apart)),
        },
        {
          ...axis,
          size: 54,
          space: 32,
          values: (_, ticks, __, ___, apart) => ticks.map((tick) => (this.about.tick ?? numberTick)(tick, apart)),
        },
      ],
      series: [
        {},
        ...this.about.series.map(({name}, index) => ({
          label: name,
          stroke: paint(COLORS[index]),
          width: 2,
          points: {show: this.data[0].length < 3, size: 6},
        })),
      ],
      hooks: {
        setCursor: [
          ({cursor: {idx}}) =>
            isKnown(idx)
              ? this.tell(
                  this.data.slice(1).map((values) => values[idx]),
                  this.data[0][idx],
                )
              : this.tell(this.latest),
        ],
      },
    };
  }

  // A moment alone would make an axis of years.
  across() {
    const xs = this.data[0];
    return [Math.min(xs[0], xs.at(-1) - (this.about.x === "time" ? LEAST_S : 1)), xs.at(-1)];
  }

  range(low, high) {
    if (!isKnown(low) || (low === 0 && high === 0)) return [0, this.about.least ?? 1];
    if (this.about.fromZero) low = Math.min(0, low);
    // What hardly moves is drawn as a line that hardly moves.
    const least = Math.abs(high) * LEAST_RANGE,
      lack = Math.max(0, least - (high - low)) / 2,
      room = (high - low + 2 * lack) * 0.08;
    return [low === 0 ? 0 : low - lack - room, high + lack + room];
  }
}

// `apart`: how far the ticks are from each other.
function numberTick(value, apart) {
  if (apart >= 1000) return short(value);
  let decimals = 0;
  while (decimals < 6 && Math.abs(apart * 10 ** decimals - Math.round(apart * 10 ** decimals)) > 1e-6) decimals += 1;
  return value.toLocaleString("en-US", {minimumFractionDigits: decimals, maximumFractionDigits: decimals});
}

function timeTick(seconds, apart) {
  const time = new Date(seconds * 1000),
    hours = {hour: "2-digit", minute: "2-digit", hourCycle: "h23"};
  if (apart >= DAY_S || (apart >= DAY_S / 4 && time.getHours() === 0))
    return time.toLocaleDateString("en-GB", {day: "numeric", month: "short"});
  return time.toLocaleTimeString("en-GB", apart < 60 ? {...hours, second: "2-digit"} : hours);
}

// Times further apart than usual get a null between them, so that no line is drawn over what nobody saw.
export function withGaps(times, series, usual) {
  const xs = [],
    columns = series.map(() => []);
  times.forEach((time, index) => {
    if (index && time - times[index - 1] > 3 * usual) {
      xs.push(times[index - 1] + usual);
      columns.forEach((column) => column.push(null));
    }
    xs.push(time);
    columns.forEach((column, which) => column.push(series[which][index] ?? null));
  });
  return [xs, ...columns];
}

// How fast a count grows, per second. Where it falls, as when a trainer leaves, nothing is known of the growth.
export function rates(times, counts) {
  return times.map((time, index) => {
    if (!index || !isKnown(counts[index]) || !isKnown(counts[index - 1])) return null;
    const grown = counts[index] - counts[index - 1];
    return grown < 0 ? null : grown / (time - times[index - 1]);
  });
}
