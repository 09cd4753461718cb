// A list of which the server gives a page at a time: asked again with every overview, but not more often than it comes.
import {ask} from "./server.js";

const AT_MOST_MS = 3000;

export class Asked {
  // `path` and what `parameters()` says are asked for; `show` gets the answer, `fail` why there is none.
  constructor(path, parameters, show, fail) {
    Object.assign(this, {path, parameters, show, fail, askedAt: -Infinity, number: 0});
  }

  refresh() {
    if (performance.now() - this.askedAt >= AT_MOST_MS && !document.hidden) this.now();
  }

  async now() {
    this.askedAt = performance.now();
    const number = ++this.number;
    try {
      const answer = await ask(this.path, this.parameters());
      if (number === this.number) this.show(answer);
    } catch (error) {
      if (number === this.number) this.fail(error);
    }
  }
}
