// A list of which the server gives a page at a time: asked again with every overview, but not more often than it comes.
// What is asked for stands in the address of the page, so that it can be kept and sent on.
import {ask} from "./server.js";

const AT_MOST_MS = 3000;

export class Asked {
  // `path`, which is the page's own too, is asked for with `parameters`, or with what the page's address says instead;
  // `show` gets the answer, `fail` why there is none.
  constructor(path, parameters, show, fail) {
    const asked = {...parameters, ...Object.fromEntries(new URLSearchParams(location.search))};
    Object.assign(this, {path, asked, show, fail, askedAt: -Infinity, number: 0});
  }

  change(changes) {
    Object.assign(this.asked, changes);
    const told = Object.entries(this.asked).filter(([name, value]) => value && !(name === "page" && value === "1"));
    history.replaceState(null, "", this.path + "?" + new URLSearchParams(told));
    this.now();
  }

  refresh() {
    if (performance.now() - this.askedAt >= AT_MOST_MS && !document.hidden) this.now();
  }

  async now() {
    this.askedAt = performance.now();
    const number = ++this.number;
    try {
      const answer = await ask(this.path, this.asked);
      if (number === this.number) this.show(answer);
    } catch (error) {
      if (number === this.number) this.fail(error);
    }
  }
}
