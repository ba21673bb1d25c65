"""The API server's end of the line to EngineCore: requests out, token counts back, calls and their answers.

When the line closes, everything that waits on it fails with `EngineDead`; a request whose reader leaves is aborted.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

from .console import Console

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class EngineDead(Exception):
    """EngineCore is gone."""


class CallFailed(Exception):
    """EngineCore answered a call with an error; it lives on."""


Progress = tuple[int, str | None]
"""Tokens made so far, and the reason when it was the last."""


class EngineClient:
    """One per API server; `run` reads for as long as EngineCore lives."""

    def __init__(self, channel: socket.socket, stats: dict[str, Any], console: Console) -> None:
        self.stats = stats
        self.dead = asyncio.Event()
        self._channel = channel
        self._console = console
        self._ids = itertools.count(1)
        self._requests: dict[int, asyncio.Queue[Progress | None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=2**24)
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except OSError:  # A killed peer with unread data resets the line instead of closing it.
            pass
        finally:
            self._fail_all()

    async def generate(self, prompt_tokens: int, max_tokens: int, prompt_key: int) -> AsyncGenerator[Progress]:
        if self.dead.is_set():
            raise EngineDead(DEAD)
        number = next(self._ids)
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        self._requests[number] = queue
        finished = False
        try:
            self._send({"add": [number, prompt_tokens, max_tokens, prompt_key]})
            while not finished:
                progress = await queue.get()
                if progress is None:
                    raise EngineDead(DEAD)
                finished = progress[1] is not None
                yield progress
        finally:
            del self._requests[number]
            if not finished and not self.dead.is_set():
                self._send({"abort": number})

    async def call(self, name: str, *args: Any) -> Any:
        if self.dead.is_set():
            raise EngineDead(DEAD)
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._send({"call": name, "id": number, "args": list(args)})
            return await answer
        finally:
            del self._calls[number]

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _take(self, message: dict[str, Any]) -> None:
        self.stats = message.get("stats", self.stats)
        for number, generated, reason in message.get("out", ()):
            if number in self._requests:
                self._requests[number].put_nowait((generated, reason))
        answer = self._calls.get(message.get("reply", 0))
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(CallFailed(message["error"]))
        else:
            answer.set_result(message["result"])

    def _fail_all(self) -> None:
        self.dead.set()
        text = "Engine core proc EngineCore died unexpectedly, shutting down client."
        self._console.vllm("ERROR", "core_client.py:704", text)
        for queue in self._requests.values():
            queue.put_nowait(None)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDead(DEAD))
