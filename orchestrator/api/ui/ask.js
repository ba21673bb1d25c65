/* Requests to the daemon that served this page, and to nobody else. The key is kept by this tab, and sent as a header: no cookies. */

const KEY = "key";
export const keyed = { value: sessionStorage.getItem(KEY) ?? "" };

export function keep(key) {
  keyed.value = key.trim();
  if (keyed.value) sessionStorage.setItem(KEY, keyed.value);
  else sessionStorage.removeItem(KEY);
}

export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `The daemon answered with status ${status}.`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

export async function refusal(answer) {
  let error = null;
  try {
    error = (await answer.json()).error;
  } catch {
    /* something between us and the daemon, which speaks no JSON */
  }
  return new Refused(answer.status, error);
}

/** The answer's head. Addresses are relative to the page's, which may stand behind a prefix. Throws Refused, TypeError (no daemon). */
export async function ask(path, { key = keyed.value, headers = {}, ...options } = {}) {
  const bearing = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers: { ...bearing, ...headers } });
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

export const modelPath = (name, rest = "") => `api/v1/models/${name.split("/").map(encodeURIComponent).join("/")}${rest}`;

/** The lines of a stream, as they come. */
export async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}
