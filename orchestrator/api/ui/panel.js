/* One model: what there is to know of it, a chat with it, its engine's log. A dialog, so that Escape closes it and the focus stays in it. */

import { ask, modelPath } from "./ask.js";
import { Chat } from "./chat.js";
import { colour } from "./colours.js";
import { line } from "./events.js";
import { Log } from "./log.js";
import { stateOf, verbButton, verbs } from "./models.js";
import { ago, by, clock, count, el, size, tell } from "./words.js";

const TABS = ["about", "chat", "log"];
const said = ([, value]) => value !== null && value !== false && JSON.stringify(value).length > 2; // not [], {}, ""

export class Panel {
  constructor({ models, events, act }) {
    this.models = models;
    this.events = events;
    this.chat = new Chat();
    this.log = new Log();
    this.box = by("panel");
    by("panel-close").addEventListener("click", () => this.box.close());
    this.box.addEventListener("close", () => this.leave());
    this.box.addEventListener("click", (event) => event.target === this.box && this.box.close());
    by("panel-actions").addEventListener("click", (event) => {
      const verb = event.target.closest("button")?.dataset.verb;
      if (verb) act(this.name, verb);
    });
    const tabs = TABS.map((tab) => by(`tab-${tab}`));
    for (const [at, tab] of tabs.entries()) {
      tab.addEventListener("click", () => this.turn(TABS[at]));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        const shown = tabs.filter((one) => !one.hidden);
        if (step) shown.at((shown.indexOf(tab) + step) % shown.length).focus();
        if (step) document.activeElement.click();
      });
    }
  }

  open(name, tab = "about") {
    this.name = name;
    this.told = null;
    tell(by("panel-title"), name);
    by("tab-log").hidden = !this.models.operator;
    this.chat.begin(name);
    if (!this.box.open) this.box.showModal();
    this.turn(tab);
    this.show();
    this.describe();
  }

  leave() {
    this.name = null;
    this.chat.stop();
    this.log.stop();
  }

  turn(to) {
    for (const tab of TABS) {
      by(`tab-${tab}`).setAttribute("aria-selected", String(tab === to));
      by(`tab-${tab}`).tabIndex = tab === to ? 0 : -1;
      by(`pane-${tab}`).hidden = tab !== to;
    }
    if (to === "log") this.log.begin(this.name);
    else this.log.stop();
    by(to === "chat" ? "talk-text" : `tab-${to}`).focus();
  }

  /** What only operators see of it: its spec, what it needs, the end of its log where it failed. */
  async describe() {
    if (!this.models.operator) return;
    const name = this.name;
    try {
      const told = await (await ask(modelPath(name))).json();
      if (name === this.name) this.told = told;
    } catch {
      this.told = null; // it is gone, or the daemon is: the rows tell
    }
    if (name === this.name) this.show();
  }

  show() {
    const model = this.models.all.get(this.name);
    if (!this.box.open) return;
    if (!model) {
      by("panel-state").replaceChildren("removed");
      return;
    }
    if (this.state !== model.state) this.describe();
    this.state = model.state;
    by("panel-colour").style.background = colour(model.name);
    by("panel-state").replaceChildren(stateOf(model));
    const wanted = this.models.operator ? verbs(model) : [];
    const box = by("panel-actions");
    if (box.dataset.verbs !== [model.name, ...wanted].join()) {
      box.dataset.verbs = [model.name, ...wanted].join();
      box.replaceChildren(...wanted.map((verb) => verbButton(verb, model.name)));
    }
    this.facts(model);
    const happened = this.events.of(model.name).slice(-30).reverse();
    const newest = `${model.name} ${happened.length} ${happened[0]?.at}`;
    if (newest !== this.newest) by("panel-events").replaceChildren(...happened.map((event) => line(event, false)));
    this.newest = newest;
  }

  facts(model) {
    const { told } = this;
    const facts = [
      ["Why", model.reason],
      ["Since", model.since ? `${clock(model.since)}, ${ago(model.since, this.models.now)} ago` : "–"],
      ["Last failure", told?.failure?.log.length ? `${model.failure}\n${told.failure.log.join("\n")}` : model.failure],
      ["GPUs", model.gpus.join(", ") || "–"],
      ["KV", model.kv && `${size(model.kv.used_bytes)} of ${size(model.kv.limit_bytes)}, ${model.kv.status}: ${model.kv.reason}`],
      ["Requests", `${model.in_flight} running, ${model.waiting} waiting`],
      ["Tokens", `${count(model.prompt_tokens)} of prompts, ${count(model.completion_tokens)} of answers`],
      ["Source", model.source],
      ["Adapters", model.adapters.join(", ")],
      ["Needs", told?.footprint && `${size(told.footprint.total_bytes)} besides KV (${told.footprint.source})`],
      ["Starts, wakes in", told?.footprint && [told.footprint.start_s, told.footprint.wake_s].map((s) => (s === null ? "–" : `${s.toFixed(1)} s`)).join(", ")],
      ["Changed by operators", told && Object.entries(told.overrides).map(([field, value]) => `${field}: ${value}`).join(", ")],
      ["Spec", told && Object.entries(told.spec).filter(said).map(([field, value]) => `${field}: ${JSON.stringify(value)}`).join("\n")],
    ].filter(([, text]) => text);
    const key = JSON.stringify(facts);
    if (key === this.key) return;
    this.key = key;
    by("facts").replaceChildren(...facts.flatMap(([what, text]) => [el("dt", {}, what), el("dd", {}, text)]));
  }
}
