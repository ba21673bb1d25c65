/* What the daemon tells each second, for as long as the page is looked at. A hidden page asks for nothing; one that was cut off tries
   again, at first soon, then every ten seconds. */

import { ask, lines, Refused } from "./ask.js";

const SILENT_MS = 15_000; // a line comes each second

export class Live {
  constructor({ hello, news, cut, needsKey }) {
    this.on = { hello, news, cut, needsKey };
    this.failures = 0;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.begin()));
  }

  begin() {
    this.stop();
    if (!document.hidden) this.run((this.going = new AbortController()));
  }

  stop() {
    clearTimeout(this.later);
    this.going?.abort();
    this.going = null;
  }

  async run(going) {
    let silence;
    try {
      const answer = await ask("ui/live", { signal: going.signal });
      let first = true;
      for await (const line of lines(answer)) {
        clearTimeout(silence);
        silence = setTimeout(() => going.abort(), SILENT_MS);
        const told = JSON.parse(line);
        if (told.error) throw new Refused(401, told.error);
        if (going !== this.going) return;
        this.failures = 0;
        if (first) this.on.hello(told);
        first = false;
        this.on.news(told);
      }
      throw new TypeError("the stream ended");
    } catch (error) {
      if (going !== this.going) return; // stopped by us
      if (error instanceof Refused && error.status === 401) {
        this.going = null;
        this.on.needsKey(error.message);
        return;
      }
      const wait = Math.min(10, 2 ** this.failures++);
      this.on.cut(error instanceof Refused ? error.message : "The daemon does not answer.", wait);
      this.later = setTimeout(() => this.begin(), wait * 1000);
    } finally {
      clearTimeout(silence);
    }
  }
}
