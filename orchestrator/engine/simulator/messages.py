"""Anthropic's Messages API: one message, the events that build it, and errors in its shape."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from .answers import BadRequest, Json, sse

REASONS = {"stop": "end_turn", "length": "max_tokens"}


@dataclass
class MessageAnswer:
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def whole(self, text: str | None, tokens: int, reason: str | None) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": [] if text is None else [{"type": "text", "text": text}],
            "model": self.model,
            "stop_reason": REASONS.get(reason or "", reason),
            "stop_sequence": None,
            "usage": {"input_tokens": self.prompt_tokens, "output_tokens": tokens},
        }

    def opening(self) -> list[bytes]:
        return [
            _event("message_start", message=self.whole(None, 0, None)),
            _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]

    def delta(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": tokens}
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta={"stop_reason": REASONS.get(reason, reason)}, usage=usage),
            _event("message_stop"),
        ]


def broken(message: str) -> bytes:
    return _event("error", error={"type": "internal_error", "message": message})


def refused(error: BadRequest) -> Json:
    inside = error.body["error"]
    return {"type": "error", "error": {"type": inside["type"], "message": inside["message"]}}


def _event(kind: str, **fields: object) -> bytes:
    return sse({"type": kind, **fields}, kind)
