/* The page: what the daemon tells each second, and where it goes. Nothing here decides; the daemon's words are shown as they are. */

import { ask, keep, keyed, modelPath } from "./ask.js";
import { Chart } from "./chart.js";
import { forgetOthers } from "./colours.js";
import { Events } from "./events.js";
import { Live } from "./live.js";
import { Models } from "./models.js";
import { Panel } from "./panel.js";
import { by, tell } from "./words.js";

const COARSE_MS = 60_000;
const page = { span: 300, charts: new Map(), operator: false, version: null };
const events = new Events();
const models = new Models({ open: (name, tab) => panel.open(name, tab), act });
const panel = new Panel({ models, events, act });
const live = new Live({ hello, news, cut, needsKey });

// ---- what is told -------------------------------------------------------------------------------------------------------

function hello(told) {
  page.operator = told.operator;
  models.clear();
  tell(by("box"), location.hostname || "");
  by("simulated").hidden = told.gpu_source !== "simulated";
  by("why-not").hidden = told.operator;
  tell(by("why-not"), `Actions and logs are for operators: ${whereTo(told)}.`);
  linked("live", "live");
  by("key-button").hidden = false;
  notice("");
  if (page.version && page.version !== told.page) notice("The daemon was upgraded, and with it this page.", true);
  page.version ??= told.page;
  past();
}

function whereTo({ admin_socket: socket, admin_tcp: tcp }) {
  const tunnel = `ssh -L 8001:${socket} ${location.hostname || "BOX"}, then http://localhost:8001/ui`;
  return tcp ? `give the admin key (Key, above), or ${tunnel}` : tunnel;
}

function news(told) {
  models.take(told, page.operator);
  const happened = events.take(told.events);
  const latest = happened.at(-1);
  if (latest && page.greeted) tell(by("said"), `${latest.model || "the daemon"}: ${latest.kind}: ${latest.reason}`);
  page.greeted = true;
  for (const card of told.gpus) {
    const chart = chartOf(card);
    if (!card.runs.length) continue;
    chart.add(card.runs, page.span, told.at);
    chart.draw();
  }
  panel.show();
}

function chartOf(card) {
  let chart = page.charts.get(card.uuid);
  if (!chart) {
    chart = new Chart(card);
    chart.spanS = page.span;
    page.charts.set(card.uuid, chart);
    by("gpus").append(chart.root);
  }
  return chart;
}

/** What came before, as far back as is shown. */
async function past() {
  clearTimeout(page.later);
  const span = page.span;
  try {
    const told = await (await ask(`ui/history?span_s=${span}`)).json();
    if (span !== page.span) return;
    for (const card of told.gpus) {
      const chart = chartOf(card);
      chart.memory.rows = [];
      chart.add(card.runs, span, told.at);
      if (chart.memory.newest) chart.draw();
    }
    forgetOthers(new Set([...models.all.keys(), ...[...page.charts.values()].flatMap((chart) => chart.memory.holders())]));
  } catch {
    /* the stream says what is wrong */
  }
  if (span > 1800 && !document.hidden) page.later = setTimeout(past, COARSE_MS);
}

// ---- what goes wrong ----------------------------------------------------------------------------------------------------

function cut(why, wait) {
  linked("cut", "offline");
  notice(`${why} What you see is old; trying again ${wait > 1 ? `in ${wait} s` : "now"}.`);
}

function needsKey(why) {
  linked("cut", "locked");
  notice("");
  tell(by("key-why"), keyed.value ? `That key is not taken. ${why}` : why);
  by("key").value = "";
  if (!by("key-box").open) by("key-box").showModal();
}

function notice(text, reload = false) {
  by("notice").hidden = !text;
  tell(by("notice").firstElementChild, text);
  by("notice").lastElementChild.hidden = !reload;
}

function linked(state, word) {
  by("link").dataset.link = state;
  tell(by("link"), word);
}

// ---- what people do -----------------------------------------------------------------------------------------------------

async function act(name, verb) {
  try {
    await ask(modelPath(name, `/${verb}`), { method: "POST" });
    notice("");
    tell(by("said"), `${verb} ${name}: asked for`);
  } catch (error) {
    notice(error.message);
  }
}

by("spans").addEventListener("click", (event) => {
  const span = Number(event.target.dataset.span);
  if (!span) return;
  page.span = span;
  for (const button of by("spans").children) button.setAttribute("aria-pressed", String(Number(button.dataset.span) === span));
  past();
});

by("key-button").addEventListener("click", () => {
  tell(by("key-why"), "Everything is asked for with it from now on.");
  by("key-box").showModal();
});
by("key-forget").addEventListener("click", () => by("key-box").close("forget"));
by("key-box").addEventListener("close", () => {
  const how = by("key-box").returnValue;
  if (how) keep(how === "ok" ? by("key").value : ""); // closed by Escape: as it was
  by("key").value = by("key-box").returnValue = "";
  live.begin();
});
by("notice").lastElementChild.addEventListener("click", () => location.reload());

const THEMES = { "": "as the system", light: "light", dark: "dark" };
function themed(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  by("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  by("theme").title = THEMES[theme];
  tell(by("theme"), { "": "auto", light: "light", dark: "dark" }[theme]);
  repaint();
}
by("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES);
  const next = order[(order.indexOf(document.documentElement.dataset.theme ?? "") + 1) % order.length];
  try {
    localStorage.setItem("theme", next);
  } catch {
    /* for this visit only */
  }
  themed(next);
});
function repaint() {
  for (const chart of page.charts.values()) if (chart.memory.newest) chart.draw(true);
  for (const model of models.all.values()) model.changed = true;
  if (models.all.size) models.show();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || /INPUT|TEXTAREA/.test(document.activeElement?.tagName) || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  by("models-filter").focus();
});

themed(document.documentElement.dataset.theme ?? "");
by("key-button").hidden = true;
live.begin();
