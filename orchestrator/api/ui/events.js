/* What happened, the newest first: the last of it, a ring. */

import { by, clock, el } from "./words.js";

const KEPT = 500;
const SHOWN = 200;

export class Events {
  constructor() {
    this.all = [];
    this.box = by("events");
    by("events-filter").addEventListener("input", () => this.show());
  }

  /** After a cut the daemon tells its last ones again. */
  take(events) {
    const known = new Set(this.all.slice(-KEPT).map(key));
    const fresh = events.filter((event) => !known.has(key(event)));
    if (!fresh.length) return fresh;
    this.all.push(...fresh);
    this.all.splice(0, this.all.length - KEPT);
    this.show();
    return fresh;
  }

  of(name) {
    return this.all.filter((event) => event.model === name);
  }

  show() {
    const wanted = by("events-filter").value.trim().toLowerCase();
    const is = (event) => `${event.model} ${event.kind} ${event.reason}`.toLowerCase().includes(wanted);
    const found = this.all.filter(is).slice(-SHOWN).reverse();
    this.box.replaceChildren(...found.map((event) => line(event, true)));
  }
}

export function line(event, named) {
  return el(
    "li",
    {},
    el("time", {}, clock(event.at)),
    el("span", { className: "state", "data-state": event.kind }, event.kind),
    named ? el("b", {}, event.model || "the daemon") : null,
    el("span", { className: "why" }, event.reason),
  );
}

const key = (event) => `${event.at} ${event.model} ${event.kind}`;
