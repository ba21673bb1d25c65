"""The Responses API: one object, the events that build it, and those that are kept (VLLM_ENABLE_RESPONSES_API_STORE=1, in memory)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import time
from typing import Any

from .answers import BadRequest, Json, sse


@dataclass
class ResponseAnswer:
    """One object, and the events that build it."""

    model: str
    prompt_tokens: int
    background: bool = False
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
            "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0, "background": self.background,
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


class Store:
    """Responses by id; those in the background with their tasks. As vLLM's: in memory, for ever."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._kept: dict[str, Json] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def keep(self, response: Json) -> None:
        if self.enabled:
            self._kept[response["id"]] = response

    def begin(self, response: Json, work: Coroutine[Any, Any, None]) -> None:
        """In the background: `work` keeps the response when it is done."""
        self.keep(response)
        task = asyncio.create_task(work)
        self._tasks[response["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(response["id"], None))

    def get(self, response_id: str) -> Json:
        if response_id not in self._kept:
            message = f"Response with id '{response_id}' not found."
            raise BadRequest(message, kind="invalid_request_error", status=404, param="response_id")
        return self._kept[response_id]

    def cancel(self, response_id: str) -> Json:
        response = self.get(response_id)
        task = self._tasks.get(response_id)
        if task is None:
            raise BadRequest("Cannot cancel a synchronous response.", kind="invalid_request_error", param="response_id")
        task.cancel()
        response["status"] = "cancelled"
        return response
