/* A colour a model, the same whenever this browser shows it. Okabe and Ito's, which colour-blind people tell apart, and olive: eight,
   taken in turn by who is seen on a GPU; beyond eight they come again, and names tell. */

const COUNT = 8;
const KEPT = "colours";
let given = {};
try {
  given = JSON.parse(localStorage.getItem(KEPT)) ?? {};
} catch {
  /* kept for this visit only */
}

export function slot(name) {
  if (!Object.hasOwn(given, name)) {
    const used = Array(COUNT).fill(0);
    for (const at of Object.values(given)) used[at] += 1;
    given[name] = used.indexOf(Math.min(...used));
    try {
      localStorage.setItem(KEPT, JSON.stringify(given));
    } catch {
      /* as above */
    }
  }
  return given[name];
}

/** Of names that are gone for good nothing is kept. */
export function forgetOthers(names) {
  given = Object.fromEntries(Object.entries(given).filter(([name]) => names.has(name)));
}

/** The theme's own, as CSS has them. */
export const shade = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
export const colour = (name) => (name ? shade(`--m${slot(name)}`) : shade("--others"));

/** `colour` with so much of the ground behind it, opaque: areas are drawn one over the other. */
export function mixed(colour, ground, part) {
  const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [one, other] = [parse(colour), parse(ground)];
  return `rgb(${one.map((value, at) => Math.round(value * part + other[at] * (1 - part))).join(" ")})`;
}
