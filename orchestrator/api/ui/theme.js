/* Light, dark, or as the system says. Run before the first paint, so that nothing flashes. */
"use strict";
try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  /* a browser that keeps nothing: as the system says */
}
