/* An engine's log as it is written: the last lines of it, however long it runs. */

import { ask, lines, modelPath } from "./ask.js";
import { by, tell } from "./words.js";

const TAIL = 200, KEPT = 1000;
const TOGETHER_MS = 100;

export class Log {
  constructor() {
    this.box = by("log");
    this.status = by("log-status");
  }

  async begin(name) {
    this.stop();
    const going = (this.going = new AbortController());
    this.lines = [];
    tell(this.box, "");
    tell(this.status, "");
    try {
      const answer = await ask(modelPath(name, `/logs?tail=${TAIL}&follow=1`), { signal: going.signal });
      for await (const line of lines(answer)) {
        this.lines.push(line);
        if (this.lines.length > KEPT) this.lines.splice(0, this.lines.length - KEPT);
        this.later ??= setTimeout(() => this.show(), TOGETHER_MS);
      }
      tell(this.status, "The daemon ended it.");
    } catch (error) {
      if (!going.signal.aborted) tell(this.status, error.message);
    }
  }

  stop() {
    this.going?.abort();
    clearTimeout(this.later);
    this.later = undefined;
  }

  show() {
    this.later = undefined;
    tell(this.box, this.lines.join("\n"));
    if (by("log-follow").checked) this.box.scrollTop = this.box.scrollHeight;
  }
}
