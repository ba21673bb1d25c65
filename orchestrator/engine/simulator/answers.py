"""The bodies of the OpenAI API as vLLM writes them: plain functions from facts to JSON values.

One prompt character is one token; output token i reads ` w<i>`, and the first follows the name of the model, so a
test can see which engine answered.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from time import time
from typing import Any

Json = dict[str, Any]


class BadRequest(Exception):
    """The request is refused; `body` is the answer."""

    def __init__(self, message: str, *, kind: str = "BadRequestError", status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, status, param)


def error_body(message: str, kind: str, status: int, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def sse(data: Json | str, event: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + b"data: " + text.encode() + b"\n\n"


def words(name: str, first: int, last: int) -> str:
    """The text of tokens first … last, both from 1."""
    return (name if first == 1 <= last else "") + "".join(f" w{i}" for i in range(first, last + 1))


def text_of(content: Any) -> str:
    """The text of a message's content, of a list of parts, or of anything inside them that bears a text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(text_of(part) for part in content)
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content") or "")
    return ""


def prompt_of(prompt: Any) -> str:
    """A completion prompt as text: a string, token ids, or a batch of either, which counts as one prompt."""
    if isinstance(prompt, int):
        return chr(prompt % 0xD800)
    if isinstance(prompt, list):
        return "".join(prompt_of(part) for part in prompt)
    return str(prompt)


def usage_of(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class Answer:
    """What the bodies of one request share; `chat` tells the two completion APIs apart. `tool`: name and arguments of the call that it
    makes; `instead`: what it says in place of words."""

    model: str
    prompt_tokens: int
    chat: bool
    tool: tuple[str, str] | None = None
    instead: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time()))

    def whole(self, text: str, tokens: int, reason: str) -> Json:
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": "tool_calls" if self.tool else reason, "stop_reason": None}
        if self.chat and self.tool:
            choice["message"] = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [self._call(*self.tool)]}
        elif self.chat:
            choice["message"] = {"role": "assistant", "content": self.instead or text, "refusal": None, "tool_calls": []}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": usage_of(self.prompt_tokens, tokens)}

    def role_chunk(self) -> Json:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def canned(self) -> list[Json]:
        """The chunks of what was settled beforehand, in parts as a model makes them."""
        if self.tool is None:
            text = self.instead or ""
            return [self._chunk({"delta": {"content": part}}, None) for part in (text[:7], text[7:]) if part] + [self.chunk("", "stop")]
        name, arguments = self.tool
        first = {**self._call(name, ""), "index": 0}
        parts = [first] + [{"index": 0, "function": {"arguments": part}} for part in (arguments[:3], arguments[3:]) if part]
        return [*(self._chunk({"delta": {"tool_calls": [part]}}, None) for part in parts), self.chunk("", "tool_calls")]

    def _call(self, name: str, arguments: str) -> Json:
        return {"id": f"chatcmpl-tool-{self.id}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def chunk(self, text: str, reason: str | None) -> Json:
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text}, reason)

    def usage_chunk(self, tokens: int) -> Json:
        return self._head(self._chunk_kind) | {"choices": [], "usage": usage_of(self.prompt_tokens, tokens)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, part: Json, reason: str | None) -> Json:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        return self._head(self._chunk_kind) | {"choices": [choice]}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def models(names: list[str], root: str, max_model_len: int) -> Json:
    shared = {"object": "model", "created": int(time()), "owned_by": "vllm", "root": root, "parent": None}
    return {
        "object": "list",
        "data": [{"id": name, **shared, "max_model_len": max_model_len, "permission": []} for name in names],
    }


def metrics(model: str, stats: Json) -> str:
    """Prometheus text, in vLLM's names."""
    labels = f'engine="0",model_name="{model}"'
    asleep = bool(stats["asleep"])
    gauges = [
        ("num_requests_running", "", stats["running"]),
        ("num_requests_waiting", "", stats["waiting"]),
        ("num_requests_waiting_by_reason", ',reason="capacity"', stats["waiting"]),
        ("num_requests_waiting_by_reason", ',reason="deferred"', 0),
        ("kv_cache_usage_perc", "", stats["usage"]),
        ("engine_sleep_state", ',sleep_state="awake"', int(not asleep)),
        ("engine_sleep_state", ',sleep_state="weights_offloaded"', int(asleep)),
        ("engine_sleep_state", ',sleep_state="discard_all"', 0),
    ]
    counters = [
        ("num_preemptions", "", stats["preemptions"]),
        ("prompt_tokens", "", stats["prompt_tokens"]),
        ("generation_tokens", "", stats["generation_tokens"]),
        *(
            ("request_success", f',finished_reason="{reason}"', stats["finished"].get(reason, 0))
            for reason in ("stop", "length", "abort", "error")
        ),
    ]
    lines: list[str] = []
    for kind, suffix, rows in (("gauge", "", gauges), ("counter", "_total", counters)):
        seen: set[str] = set()
        for name, extra, value in rows:
            if name not in seen:
                seen.add(name)
                lines += [f"# HELP vllm:{name}{suffix} Simulated.", f"# TYPE vllm:{name}{suffix} {kind}"]
            lines.append(f"vllm:{name}{suffix}{{{labels}{extra}}} {float(value)}")
    return "\n".join(lines) + "\n"
