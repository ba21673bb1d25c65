/* The models as a table: who is busy first. Rows stay the same elements, and keep their place while somebody points at one. */

import { colour, shade } from "./colours.js";
import { ago, by, count, el, size, tell } from "./words.js";

const VERBS = {
  stopped: ["load"], backoff: ["load"], failed: ["load"],
  waiting: ["unload"], starting: ["unload"], waking: ["unload"],
  ready: ["sleep", "unload"], asleep: ["wake", "unload"],
  draining: [], stopping: [],
};
const RANK = { failed: 1, backoff: 1, ready: 2, asleep: 3, stopped: 4 };

/** What an operator may do with it now. */
export function verbs(model) {
  const found = model.held ? (model.state === "stopped" ? ["start"] : []) : (VERBS[model.state] ?? []);
  return [...found, model.pinned ? "unpin" : "pin"];
}

export const stateOf = (model) => el("span", { className: "state", "data-state": model.state }, model.state);

export class Models {
  constructor({ open, act }) {
    this.on = { open, act };
    this.all = new Map();
    this.rows = new Map();
    this.box = by("rows");
    by("models-filter").addEventListener("input", () => this.show());
    this.box.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      const name = button?.closest("tr").dataset.name;
      if (!button) return;
      if (button.dataset.verb) act(name, button.dataset.verb);
      else open(name, button.dataset.tab);
    });
  }

  take({ models, gone, at }, operator) {
    this.operator = operator;
    for (const model of models) {
      const before = this.all.get(model.name);
      const seconds = before ? Math.max(1, at - before.at) : 1;
      const more = before ? model.completion_tokens - before.completion_tokens : 0;
      this.all.set(model.name, { ...model, at, rate: Math.max(0, more / seconds), changed: true });
    }
    const told = new Set(models.map((model) => model.name));
    for (const model of this.all.values()) {
      if (!told.has(model.name)) Object.assign(model, { at, rate: 0, changed: model.changed || model.rate > 0 });
    }
    for (const name of gone) {
      this.all.delete(name);
      this.rows.get(name)?.root.remove();
      this.rows.delete(name);
    }
    this.now = at;
    this.show();
  }

  clear() {
    this.all.clear();
    this.rows.clear();
    this.box.replaceChildren();
  }

  show() {
    const wanted = by("models-filter").value.trim().toLowerCase();
    const is = (model) => `${model.name} ${model.state} ${model.reason} ${model.source ?? ""}`.toLowerCase().includes(wanted);
    const order = [...this.all.values()].sort(before);
    let shown = 0;
    for (const model of order) {
      const row = this.rows.get(model.name) ?? this.made(model.name);
      if (model.changed) this.fill(row, model);
      model.changed = false;
      tell(row.used, model.in_flight ? "now" : model.used_at ? ago(model.used_at, this.now) : "–");
      row.root.hidden = Boolean(wanted) && !is(model);
      shown += !row.root.hidden;
    }
    if (!this.box.matches(":hover, :focus-within") || this.box.children.length !== order.length) this.sort(order);
    this.box.parentElement.classList.toggle("tokenless", order.every((model) => !model.prompt_tokens));
    tell(by("models-count"), wanted ? `${shown} of ${this.all.size}` : `${this.all.size}`);
    by("none").hidden = shown > 0;
    tell(by("none"), this.all.size ? "None is like that." : "No model yet: `orchestratorctl add-model NAME SOURCE` adds one.");
  }

  sort(order) {
    order.forEach((model, at) => {
      const root = this.rows.get(model.name).root;
      if (this.box.children[at] !== root) this.box.insertBefore(root, this.box.children[at] ?? null);
    });
  }

  made(name) {
    const cell = (className, ...inside) => el("td", { role: "cell", className }, ...inside);
    const row = { swatch: el("span", { className: "swatch" }), pin: el("span", { className: "chip", hidden: true }, "pinned") };
    row.name = el("button", { type: "button", className: "link" }, name);
    row.state = el("span", { className: "state" });
    row.why = cell("why");
    row.fill = el("span");
    row.meter = el("span", { className: "meter", role: "img" }, row.fill);
    row.kv = el("span", { className: "dim" });
    row.requests = cell("number requests");
    row.tokens = cell("number tokens");
    row.used = cell("number used");
    row.chat = el("button", { type: "button", className: "quiet", "aria-label": `Chat with ${name}` }, "chat");
    row.chat.dataset.tab = "chat";
    row.actions = el("span", { className: "verbs" });
    const cells = [
      cell("name", row.swatch, row.name, row.pin), cell("stateof", row.state), row.why, cell("kv", row.meter, row.kv),
      row.requests, row.tokens, row.used, cell("actions", row.chat, row.actions),
    ];
    row.root = el("tr", { role: "row" }, ...cells);
    row.root.dataset.name = name;
    this.rows.set(name, row);
    this.box.append(row.root);
    return row;
  }

  fill(row, model) {
    row.swatch.style.background = model.kv || model.gpus.length ? colour(model.name) : shade("--none");
    row.pin.hidden = !model.pinned;
    tell(row.state, model.state);
    row.state.dataset.state = model.state;
    const why = model.phase && model.state === "starting" ? `${model.phase}` : model.reason;
    tell(row.why, why);
    row.why.title = model.failure && model.failure !== why ? `${why}\nLast failure: ${model.failure}` : why;
    row.meter.hidden = !model.kv;
    if (model.kv) {
      row.fill.style.width = `${Math.min(100, (100 * model.kv.used_bytes) / Math.max(1, model.kv.limit_bytes))}%`;
      row.fill.style.background = colour(model.name);
      row.meter.setAttribute("aria-label", `${size(model.kv.used_bytes)} of ${size(model.kv.limit_bytes)}`);
    }
    tell(row.kv, model.kv ? `${size(model.kv.used_bytes)} of ${size(model.kv.limit_bytes)}${model.kv.status === "applied" ? "" : `, ${model.kv.status}`}` : "–");
    row.kv.title = model.kv?.reason ?? "";
    tell(row.requests, `${model.in_flight || (model.waiting ? 0 : "–")}${model.waiting ? ` + ${model.waiting} waiting` : ""}`);
    const tokens = model.prompt_tokens + model.completion_tokens;
    tell(row.tokens, model.rate >= 1 ? `${count(tokens)}, ${count(model.rate)}/s` : tokens ? count(tokens) : "–");
    row.tokens.title = `${model.prompt_tokens} of prompts, ${model.completion_tokens} of answers`;
    this.offer(row, model);
  }

  offer(row, model) {
    const wanted = this.operator ? verbs(model) : [];
    if (row.actions.dataset.verbs === wanted.join()) return;
    row.actions.dataset.verbs = wanted.join();
    const focused = row.actions.contains(document.activeElement);
    row.actions.replaceChildren(...wanted.map((verb) => verbButton(verb, model.name)));
    if (focused) (row.actions.querySelector("button") ?? row.name).focus();
  }
}

export function verbButton(verb, name) {
  const made = el("button", { type: "button", "aria-label": `${verb} ${name}` }, verb);
  made.dataset.verb = verb;
  return made;
}

function before(one, other) {
  const rank = (model) => (model.in_flight + model.waiting || !(model.state in RANK) ? 0 : RANK[model.state]);
  const recent = rank(one) === 4 ? (other.used_at ?? 0) - (one.used_at ?? 0) : 0;
  return rank(one) - rank(other) || recent || (one.name < other.name ? -1 : 1);
}

