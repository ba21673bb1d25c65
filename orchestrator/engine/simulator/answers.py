"""The bodies of the OpenAI API as vLLM writes them: plain functions from facts to JSON values.

One prompt character is one token; output token i reads ` w<i>`, and the first follows the name of the model, so a
test can see which engine answered.
"""

from __future__ import annotations

import base64
import json
import struct
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
    """What the bodies of one request share; `chat` tells the two completion APIs apart."""

    model: str
    prompt_tokens: int
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time()))

    def whole(self, text: str, tokens: int, reason: str) -> Json:
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": usage_of(self.prompt_tokens, tokens)}

    def role_chunk(self) -> Json:
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

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


@dataclass
class ResponseAnswer:
    """The Responses API: one object, and the events that build it."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time()))
    _sequence: int = 0

    def whole(self, text: str | None, tokens: int, status: str) -> Json:
        output = [] if text is None else [self._item(text, "completed")]
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + tokens,
        }
        return {
            "id": f"resp_{self.id}", "object": "response", "created_at": self.created, "model": self.model,
            "status": status, "output": output, "usage": None if text is None else usage, "error": None,
            "incomplete_details": None, "instructions": None, "metadata": None, "parallel_tool_calls": True,
            "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
        }  # fmt: skip

    def opening(self) -> list[bytes]:
        created = self.whole(None, 0, "in_progress")
        return [
            self._event("response.created", response=created),
            self._event("response.in_progress", response=created),
            self._event("response.output_item.added", output_index=0, item=self._item("", "in_progress")),
            self._part("response.content_part.added", part=_part("")),
        ]

    def delta(self, text: str) -> bytes:
        return self._part("response.output_text.delta", delta=text, logprobs=[])

    def closing(self, text: str, tokens: int) -> list[bytes]:
        return [
            self._part("response.output_text.done", text=text, logprobs=[]),
            self._part("response.content_part.done", part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=self._item(text, "completed")),
            self._event("response.completed", response=self.whole(text, tokens, "completed")),
        ]

    def _item(self, text: str, status: str) -> Json:
        content = [_part(text)] if text else []
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=f"msg_{self.id}", output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return sse(data, kind)


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def embeddings(model: str, inputs: list[str], *, as_base64: bool) -> Json:
    """Sixteen numbers for each input, from its characters: the same input gives the same vector."""
    data: list[Json] = []
    for index, text in enumerate(inputs):
        vector = [float(sum(map(ord, text[i::16])) % 997) / 997 for i in range(16)]
        value: Any = base64.b64encode(struct.pack("<16f", *vector)).decode() if as_base64 else vector
        data.append({"index": index, "object": "embedding", "embedding": value})
    tokens = sum(map(len, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    identity = {"id": f"embd-{uuid.uuid4().hex}", "object": "list", "created": int(time()), "model": model}
    return identity | {"data": data, "usage": usage}


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
