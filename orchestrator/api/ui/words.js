/* Sizes, times and elements. Whatever comes from outside becomes text here, never markup. */

const MIB = 1 << 20;

/** "12.3 GiB", "640 MiB". */
export function size(bytes) {
  const mib = bytes / MIB;
  return Math.abs(mib) >= 1000 ? `${(mib / 1024).toFixed(1)} GiB` : `${Math.round(mib)} MiB`;
}

/** "4 s", "12 min", "3 h", "2 d": since `at`, seconds since the epoch. */
export function ago(at, now) {
  const s = Math.max(0, Math.round(now - at));
  if (s < 100) return `${s} s`;
  if (s < 5940) return `${Math.round(s / 60)} min`;
  return s < 172_800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86_400)} d`;
}

/** "14:03:07", with the day where that is not today. */
export function clock(at) {
  const when = new Date(at * 1000);
  const time = when.toTimeString().slice(0, 8);
  return when.toDateString() === new Date().toDateString() ? time : `${when.getDate()}.${when.getMonth() + 1}. ${time}`;
}

/** "1.2 k", "3.4 M". */
export function count(number) {
  if (number < 1000) return String(Math.round(number));
  return number < 1e6 ? `${(number / 1e3).toFixed(1)} k` : `${(number / 1e6).toFixed(1)} M`;
}

/** An element: properties, then children; a string is text. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Only where it is another, so that selections and screen readers are left in peace. */
export function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const by = (id) => document.getElementById(id);
