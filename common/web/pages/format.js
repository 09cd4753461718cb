// Numbers as people read them. All of them are text: nothing here makes HTML.
const wholes = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
const digits = new Intl.NumberFormat("en-US", {maximumSignificantDigits: 3});
const millions = new Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 4});
const compacts = new Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 3});
const BYTE_UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
export const UNKNOWN = "–";

export const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);
export const count = (value) => (isKnown(value) ? wholes.format(value) : UNKNOWN);
const TINY = 1e-4;
// Three digits, or all of a large number.
export function number(value) {
  if (!isKnown(value)) return UNKNOWN;
  if (value !== 0 && Math.abs(value) < TINY) return value.toExponential(1);
  return (Math.abs(value) >= 1000 ? wholes : digits).format(value);
}
export const short = (value) => (isKnown(value) ? compacts.format(value) : "");

// Whole, or in millions and billions where that would not fit beside a heading.
export const large = (value) => (isKnown(value) && value >= 1e8 ? millions.format(value) : count(value));
export const loss = (value) => (isKnown(value) ? value.toFixed(3) : UNKNOWN);

export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  let unit = 0;
  while (Math.round(value) >= 1000 && unit < BYTE_UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return (unit && value < 100 ? value.toFixed(1) : wholes.format(value)) + " " + BYTE_UNITS[unit];
}

export function percent(part, whole) {
  if (!isKnown(part) || !whole) return UNKNOWN;
  const share = (100 * part) / whole;
  return (share > 0 && share < 0.01 ? "under 0.01" : digits.format(share)) + " %";
}

export function duration(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const minutes = Math.floor(seconds / 60),
    hours = Math.floor(minutes / 60),
    days = Math.floor(hours / 24);
  if (days) return `${wholes.format(days)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

export const shortId = (id) => "…" + id.slice(-6);
export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
export const range = (low, high) => (low === high ? count(low) : `${count(low)} to ${count(high)}`);
export const moment = (seconds) =>
  new Date(seconds * 1000).toLocaleString("en-GB", {dateStyle: "medium", timeStyle: "short"});
export const timeOfDay = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
