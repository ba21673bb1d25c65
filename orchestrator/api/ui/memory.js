/* One GPU's rows, in a ring as long as what is shown, and the columns that a chart is drawn of. All sizes are GiB. */

export const OTHERS = "";
const SHOWN = 10; // models by name in a picture; the rest are one
const FINE_S = 2, COARSE_S = 30;
const FINE_SPAN_S = 1800;

export class Memory {
  constructor(card) {
    Object.assign(this, { uuid: card.uuid, index: card.index, name: card.name, totalBytes: card.total_bytes });
    this.total = card.total_bytes / 2 ** 30;
    this.rows = [];
  }

  /** `runs` as the daemon tells them: rows with the same models together. */
  add(runs, spanS, now) {
    const coarse = spanS > FINE_SPAN_S;
    for (const { models, rows } of runs) {
      for (const [at, ...mib] of rows) {
        const last = this.rows.at(-1);
        if (last && at <= last.at) continue;
        if (coarse && last && at - last.at < COARSE_S) continue;
        this.rows.push({ at, models, mib });
      }
    }
    const from = this.rows.findIndex((row) => row.at >= now - spanS);
    this.rows.splice(0, from < 0 ? this.rows.length : from);
  }

  get newest() {
    return this.rows.at(-1);
  }

  /** Who has, or had, memory here: the largest by name, in the order of their names; then the rest, if there is one. */
  holders() {
    const most = new Map();
    for (const { models, mib } of this.rows) {
      models.forEach((name, at) => most.set(name, Math.max(most.get(name) ?? 0, mib[3 + 3 * at] + mib[4 + 3 * at])));
    }
    const named = [...most.keys()].filter((name) => name !== OTHERS).sort((a, b) => most.get(b) - most.get(a));
    const rest = named.length > SHOWN || most.has(OTHERS);
    return [...named.slice(0, SHOWN).sort(), ...(rest ? [OTHERS] : [])];
  }

  /** Of each row: at, reserve, foreign, claims, and of each holder [fixed, kv, limit]. A null row stands where nothing was seen. */
  columns(holders, spanS) {
    const place = new Map(holders.map((name, at) => [name, at]));
    const gap = 4 * (spanS > FINE_SPAN_S ? COARSE_S : FINE_S);
    const found = { at: [], reserve: [], foreign: [], claims: [], of: holders.map(() => ({ fixed: [], kv: [], limit: [] })) };
    const push = (at, whole, threes) => {
      found.at.push(at);
      ["reserve", "foreign", "claims"].forEach((what, n) => found[what].push(whole && whole[n] / 1024));
      found.of.forEach((column, n) => {
        ["fixed", "kv", "limit"].forEach((what, k) => column[what].push(threes && threes[n][k] / 1024));
      });
    };
    let before = null;
    for (const { at, models, mib } of this.rows) {
      if (before !== null && at - before > gap) push(before + 0.1, null, null);
      const threes = holders.map(() => [0, 0, 0]);
      models.forEach((name, n) => {
        const into = threes[place.get(name) ?? holders.length - 1];
        for (let k = 0; k < 3; k++) into[k] += mib[3 + 3 * n + k];
      });
      push(at, mib.slice(0, 3), threes);
      before = at;
    }
    return found;
  }
}
