/* A word with a model, to try it: streamed, with what it waits for, and with errors as the API says them. A model without a chat template
   gets the last message as a prompt. */

import { ask, keyed, lines, Refused } from "./ask.js";
import { by, el, tell } from "./words.js";

const NO_TEMPLATE = /chat.?template/i;

export class Chat {
  constructor() {
    this.box = by("talk");
    this.form = by("talk-form");
    this.text = by("talk-text");
    this.status = by("talk-status");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.say();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    by("talk-stop").addEventListener("click", () => this.stop());
    by("talk-clear").addEventListener("click", () => this.begin(this.model));
  }

  begin(model) {
    this.stop();
    [this.model, this.messages, this.plain] = [model, [], false];
    this.box.replaceChildren();
    tell(this.status, "");
  }

  stop() {
    this.going?.abort();
  }

  async say() {
    const content = this.text.value.trim();
    if (!content || this.going) return;
    this.text.value = "";
    this.messages.push({ role: "user", content });
    this.put("user", content);
    const answer = this.put("assistant", "");
    const going = (this.going = new AbortController());
    this.busy(true);
    const began = performance.now();
    let words = 0;
    try {
      for await (const piece of this.pieces(going.signal)) {
        words += 1;
        answer.append(piece);
        this.box.scrollTop = this.box.scrollHeight;
      }
      const took = (performance.now() - began) / 1000;
      tell(this.status, `${words} pieces in ${took.toFixed(1)} s`);
      this.messages.push({ role: "assistant", content: answer.textContent });
    } catch (error) {
      const stopped = going.signal.aborted;
      if (stopped && answer.textContent) this.messages.push({ role: "assistant", content: answer.textContent });
      else this.messages.pop();
      if (!answer.textContent) answer.parentElement.remove();
      tell(this.status, stopped ? "Stopped." : "");
      if (!stopped) this.put("error", error.message);
      if (error instanceof Refused && error.status === 401) by("talk-key-label").hidden = false;
    } finally {
      this.going = null;
      this.busy(false);
    }
  }

  async *pieces(signal) {
    if (!this.plain) {
      try {
        yield* this.streamed("v1/chat/completions", { messages: this.messages }, signal);
        return;
      } catch (error) {
        if (!(error instanceof Refused && NO_TEMPLATE.test(error.message))) throw error;
        this.plain = true; // a base model: it goes on with what it is given
        this.put("note", "This model has no chat template: it goes on with your text.");
      }
    }
    yield* this.streamed("v1/completions", { prompt: this.messages.at(-1).content, max_tokens: 256 }, signal);
  }

  async *streamed(path, asked, signal) {
    tell(this.status, "Asking…");
    const answer = await ask(path, {
      method: "POST",
      signal,
      key: by("talk-key").value.trim() || keyed.value,
      headers: { "Content-Type": "application/json", "X-Progress": "sse" },
      body: JSON.stringify({ model: this.model, stream: true, ...asked }),
    });
    for await (const line of lines(answer)) {
      if (line.startsWith(":")) tell(this.status, line.slice(1).trim());
      if (!line.startsWith("data:") || line.slice(5).trim() === "[DONE]") continue;
      const told = JSON.parse(line.slice(5));
      if (told.error) throw new Refused(Number(told.error.code) || 400, told.error);
      const choice = told.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? choice?.text;
      if (piece) {
        tell(this.status, "Answering…");
        yield piece;
      }
    }
  }

  put(who, text) {
    const said = el("p", {}, text);
    const names = { user: "You", assistant: this.model, error: "Refused", note: "Note" };
    this.box.append(el("div", { className: `said ${who}` }, el("b", {}, names[who]), said));
    this.box.scrollTop = this.box.scrollHeight;
    return said;
  }

  busy(is) {
    by("talk-stop").hidden = !is;
    by("talk-send").hidden = is;
  }
}
