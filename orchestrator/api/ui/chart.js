/* One GPU as a picture: what holds its memory, stacked over time, and below it each model's KV against its limit; beside them the same
   in figures, of now or of where the pointer is. */

import { colour, mixed, shade } from "./colours.js";
import { Memory } from "./memory.js";
import { clock, el, size, tell } from "./words.js";

const GIB = 2 ** 30;
const KV_PART = 0.5; // of a model's colour in its KV; what is fixed has all of it

export class Chart {
  constructor(card) {
    this.memory = new Memory(card);
    this.sum = el("span", { className: "dim" });
    this.plot = el("div", { className: "plot", role: "img" });
    this.kvPlot = el("div", { className: "plot", role: "img" });
    this.when = el("th", { scope: "col" }, "now");
    this.body = el("tbody");
    const head = el("tr", {}, this.when, ...["fixed", "KV", "limit"].map((word) => el("th", { scope: "col", className: "number" }, word)));
    this.root = el(
      "article",
      { className: "gpu" },
      el("div", { className: "bar" }, el("h2", {}, `GPU ${card.index}`), el("span", { className: "dim" }, card.name), el("span", { className: "gap" }), this.sum),
      el(
        "div",
        { className: "pictures" },
        el("p", { className: "caption" }, "GiB held; a model's KV is its fainter part. Dashed: where all KV limits together end"),
        this.plot,
        (this.kvCaption = el("p", { className: "caption" }, "KV in use. Dashed: its limit")),
        this.kvPlot,
      ),
      el("table", { className: "readout" }, el("thead", {}, head), this.body),
    );
    new ResizeObserver(() => this.fit()).observe(this.plot);
  }

  add(runs, spanS, now) {
    this.memory.add(runs, spanS, now);
    this.spanS = spanS;
    this.now = now;
  }

  /** With what has come; made anew where somebody new holds memory, or in other colours. */
  draw(anew = false) {
    const holders = this.memory.holders();
    const columns = this.memory.columns(holders, this.spanS);
    const names = JSON.stringify(holders);
    this.columns = columns;
    if (anew || names !== this.names || !this.stack) this.make(holders, names);
    this.stack.setData(this.stacked(columns));
    this.kv.setData([columns.at, ...columns.of.flatMap(({ kv, limit }) => [kv, limit])]);
    this.kvPlot.hidden = this.kvCaption.hidden = !holders.length;
    this.figures();
  }

  make(holders, names) {
    this.stack?.destroy();
    this.kv?.destroy();
    [this.holders, this.names] = [holders, names];
    const ground = shade("--card");
    const area = (fill) => ({ fill, width: 0, points: { show: false } });
    const line = (stroke, dash, more = {}) => ({ stroke, dash, width: 1.5, points: { show: false }, ...more });
    const stepped = globalThis.uPlot.paths.stepped({ align: 1 });
    const colours = holders.map((name) => colour(name));
    const layers = [area(shade("--foreign")), ...colours.flatMap((one) => [area(one), area(mixed(one, ground, KV_PART))]), area(shade("--claims"))];
    const series = [{}, area(shade("--reserve")), area(ground), ...layers.reverse(), line(shade("--text"), [5, 4], { paths: stepped, width: 1 })];
    this.stack = this.uplot(this.plot, series, 200, () => [0, this.memory.total]);
    const kvSeries = colours.flatMap((one) => [line(one, [], { fill: `${one}30` }), line(one, [4, 3], { paths: stepped })]);
    this.kv = this.uplot(this.kvPlot, [{}, ...kvSeries], 120, () => [0, this.mostKv()]);
    this.body.replaceChildren(...this.lines());
  }

  /** The scale of the lower picture: what was used, and the limits of now. A limit that was higher for a moment runs out of it. */
  mostKv() {
    const most = this.columns.of.map(({ kv, limit }) => Math.max(limit.at(-1) ?? 0, ...kv));
    return 1.15 * Math.max(0.2, ...most);
  }

  uplot(into, series, height, range) {
    const axis = { stroke: shade("--dim"), font: "11px system-ui", grid: { stroke: shade("--grid"), width: 1 }, ticks: { show: false } };
    const words = (_, splits, __, ___, step) => splits.map((at) => new Date(at * 1000).toTimeString().slice(0, step < 60 ? 8 : 5));
    const shown = {
      width: Math.max(120, into.clientWidth),
      height,
      series,
      legend: { show: false },
      padding: [6, 4, 0, 0],
      drawOrder: ["series", "axes"],
      scales: { x: { time: true, range: () => [this.now - this.spanS, this.now] }, y: { range } },
      axes: [{ ...axis, size: 22, gap: 3, space: 70, values: words }, { ...axis, size: 40, gap: 4, space: 26, values: (_, splits) => splits.map((n) => `${n}`) }],
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false }, sync: { key: this.memory.uuid } },
      hooks: { setCursor: [(plot) => this.figures(plot.cursor.idx)] },
    };
    return new globalThis.uPlot(shown, [[]], into);
  }

  /** Cumulative, the topmost first: each is drawn over the one before, down to nothing. */
  stacked({ at, reserve, foreign, claims, of }) {
    const layers = [foreign, ...of.flatMap(({ fixed, kv }) => [fixed, kv]), claims];
    const tops = [];
    let below = at.map(() => 0);
    for (const layer of layers) {
      below = layer.map((value, n) => (value === null ? null : below[n] + value));
      tops.push(below);
    }
    const bound = below.map((top, n) => (top === null ? null : of.reduce((sum, { kv, limit }) => sum + Math.max(limit[n], kv[n]) - kv[n], top)));
    const total = at.map((_, n) => (reserve[n] === null ? null : this.memory.total));
    return [at, total, total.map((all, n) => (all === null ? null : all - reserve[n])), ...tops.reverse(), bound];
  }

  // ---- in figures -----------------------------------------------------------------------------------------------------

  lines() {
    this.cells = [];
    const line = (name, fill, kind = "") => {
      const swatch = el("span", { className: "swatch" });
      swatch.style.background = fill;
      const cells = [0, 1, 2].map(() => el("td", { className: "number" }));
      this.cells.push(cells);
      return el("tr", { className: kind }, el("th", { scope: "row" }, swatch, el("span", {}, name)), ...cells);
    };
    return [
      line("free", shade("--card"), "free"),
      line("reserve", shade("--reserve")),
      line("claims", shade("--claims")),
      ...[...this.holders].reverse().map((name) => line(name || "other models", colour(name))),
      line("foreign", shade("--foreign")),
    ];
  }

  figures(pointed) {
    const { columns, holders } = this;
    if (!columns || !this.cells) return;
    const there = Number.isInteger(pointed) && columns.reserve[pointed] !== null && pointed < columns.at.length - 1;
    const n = there ? pointed : columns.at.length - 1;
    if (n < 0 || columns.reserve[n] === null) return;
    const of = columns.of.map(({ fixed, kv, limit }) => [fixed[n], kv[n], limit[n]]);
    const used = columns.foreign[n] + of.reduce((sum, [fixed, kv]) => sum + fixed + kv, 0);
    const free = this.memory.total - used - columns.reserve[n] - columns.claims[n];
    const show = (value, dash = "") => (value > 0.0005 ? size(value * GIB) : dash);
    const whole = (value) => [size(value * GIB), "", ""];
    const threes = of.map(([fixed, kv, limit]) => [show(fixed, "–"), show(kv, "–"), show(limit, "–")]).reverse();
    const texts = [whole(free), whole(columns.reserve[n]), whole(columns.claims[n]), ...threes, whole(columns.foreign[n])];
    texts.forEach((three, row) => three.forEach((text, at) => tell(this.cells[row][at], text)));
    tell(this.when, there ? clock(columns.at[n]) : "now");
    if (there) return;
    const limits = of.reduce((sum, [, , limit]) => sum + limit, 0);
    tell(this.sum, `${size(used * GIB)} of ${size(this.memory.totalBytes)} used`);
    const told = holders.map((name, at) => `${name || "other models"} ${threes[holders.length - 1 - at].slice(0, 2).join(" and KV ")}`);
    this.plot.setAttribute("aria-label", `Memory of GPU ${this.memory.index} over time. Now: ${this.sum.textContent}; ${told.join("; ")}`);
    this.kvPlot.setAttribute("aria-label", `KV memory over time against its limits, ${size(limits * GIB)} together`);
  }

  fit() {
    const width = this.plot.clientWidth;
    if (!this.stack || !width || width === this.stack.width) return;
    this.stack.setSize({ width, height: this.stack.height });
    this.kv.setSize({ width, height: this.kv.height });
  }
}

