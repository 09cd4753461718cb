// The few things that pages do to their documents. Whatever comes from a peer is set as text, never read as HTML.
import {count} from "./format.js";

export const at = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A cell is a text, or {text, href, title, tag, className}, or a list of these. What is there already is changed in
// place, so that whoever stands on a link with the keyboard stays there.
function fillCell(cell, parts) {
  const list = Array.isArray(parts) ? parts : [parts];
  while (cell.children.length > list.length) cell.lastElementChild.remove();
  list.forEach((part, index) => {
    const {text, href, title, className} = typeof part === "string" ? {text: part} : part;
    const tag = href ? "A" : "SPAN";
    let element = cell.children[index];
    if (!element || element.tagName !== tag) {
      const made = make(tag.toLowerCase());
      if (element) element.replaceWith(made);
      else cell.append(...(index ? [" "] : []), made);
      element = made;
    }
    setText(element, text);
    for (const [name, value] of Object.entries({href, title, class: className})) {
      if (!value) element.removeAttribute(name);
      else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
    }
  });
}

// `columns`: {name, number, cell(row)}; the first cell of each row is its heading.
export function fillTable(table, columns, rows) {
  if (!table.tHead) {
    const heads = columns.map(({name, number}) => make("th", {scope: "col", class: number ? "number" : null}, name));
    table.append(make("thead", {}, make("tr", {}, ...heads)), make("tbody"));
  }
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  while (body.rows.length < rows.length) {
    body.append(
      make(
        "tr",
        {},
        ...columns.map(({number}, index) =>
          make(index ? "td" : "th", {scope: index ? null : "row", class: number ? "number" : null}),
        ),
      ),
    );
  }
  rows.forEach((row, y) => columns.forEach(({cell}, x) => fillCell(body.rows[y].cells[x], cell(row))));
}

export function fillFacts(list, facts) {
  const wanted = facts.filter(([, value]) => value !== null);
  if (
    list.children.length !== wanted.length ||
    wanted.some(([name], index) => list.children[index].firstChild.textContent !== name)
  ) {
    list.replaceChildren(...wanted.map(([name]) => make("div", {}, make("dt", {}, name), make("dd"))));
  }
  wanted.forEach(([, value], index) => fillCell(list.children[index].lastChild, value));
}

// Buttons to leaf through a list of which the server gives one page at a time.
export function fillPager(pager, {total, page, pages}, what, turn) {
  if (!pager.children.length) {
    const [back, words, on] = [
      make("button", {type: "button"}, "Back"),
      make("span", {class: "faint", "aria-live": "polite"}),
      make("button", {type: "button"}, "Next"),
    ];
    back.addEventListener("click", () => pager.turn(-1));
    on.addEventListener("click", () => pager.turn(1));
    pager.append(back, words, on);
  }
  const [back, words, on] = pager.children;
  pager.turn = (by) => turn(page + by);
  back.disabled = page <= 1;
  on.disabled = page >= pages;
  pager.hidden = pages <= 1;
  setText(words, `page ${count(page)} of ${count(pages)}, ${count(total)} ${what}`);
}

export function copyButton(words, text) {
  const button = make("button", {type: "button"}, words);
  button.addEventListener("click", async () => {
    const done = await copied(text());
    button.textContent = done ? "Copied" : "Select it and copy";
    setTimeout(() => {
      button.textContent = words;
    }, 2000);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // only where the page is this machine's, or comes over TLS
    return true;
  } catch {
    return copiedByHand(text);
  }
}

function copiedByHand(text) {
  const area = make("textarea", {class: "unseen", "aria-hidden": "true", tabindex: "-1"});
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (before) before.focus();
  return done;
}
