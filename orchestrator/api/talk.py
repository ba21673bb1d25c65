"""A client's side of a realtime connection: refused in HTTP before it was accepted, in an event and a close code from then on."""

import asyncio
import json
import time
from collections import deque

import msgspec
from starlette.types import Message, Receive, Send

from orchestrator.api import error_body
from orchestrator.api.ids import Ids
from orchestrator.errors import BadRequest, OrchestratorError

MESSAGE_BYTES = 16 << 20  # uvicorn's bound too
POLICY, FAULT, LATER = 1008, 1011, 1013  # close codes: what you did, what we did, come back later
HELD_BYTES = 1 << 20  # of a client's messages that its engine has not got yet; it is not read from beyond that
UNSAID = frozenset({1005, 1006, 1015})  # codes that are seen and never sent (RFC 6455 7.4.1)


class Left(Exception):
    """The client has closed, or is gone."""


class Heard:
    """What a client said and its engine has not got yet."""

    def __init__(self) -> None:
        self._messages: deque[str | bytes] = deque()
        self._bytes = 0
        self._more, self._less = asyncio.Event(), asyncio.Event()

    async def put(self, message: str | bytes) -> None:
        while self._bytes > HELD_BYTES:
            self._less.clear()
            await self._less.wait()
        self._messages.append(message)
        self._bytes += len(message) + 1
        self._more.set()

    async def get(self) -> str | bytes:
        while not self._messages:
            self._more.clear()
            await self._more.wait()
        message = self._messages.popleft()
        self._bytes -= len(message) + 1
        self._less.set()
        return message


class _Event(msgspec.Struct):
    type: str = ""
    model: str | None = None


class Talk:
    """`code` and `reason`: how the client closed, or is closed here; what its engine is told."""

    def __init__(self, receive: Receive, send: Send, made: Ids, subprotocol: str | None) -> None:
        self._receive, self._send, self._ids, self._subprotocol = receive, send, made, subprotocol
        self._accepted = self._closed = self._begun = False
        self.code, self.reason = 1000, ""
        self._said_at = 0.0

    def begin(self) -> None:
        """It has its engine."""
        self._begun, self._said_at = True, time.monotonic()

    @property
    def silent_s(self) -> float:
        """For how long neither side has said anything; 0 while it waits for its engine."""
        return time.monotonic() - self._said_at if self._begun else 0.0

    async def accept(self) -> None:
        self._accepted = True
        headers = [(b"x-request-id", self._ids.request_id), (b"traceparent", self._ids.traceparent)]
        await self._send({"type": "websocket.accept", "subprotocol": self._subprotocol, "headers": headers})

    async def greet(self) -> None:
        """As an engine does."""
        await self.accept()
        await self._say({"type": "session.created", "id": f"sess-{self._ids.request_id.decode()}", "created": int(time.time())})

    async def first_model(self, silence_s: float) -> tuple[str, str | bytes]:
        """What the first event names, and that event. Raises BadRequest, Left."""
        try:
            async with asyncio.timeout(silence_s):
                first = await self._next()
        except TimeoutError:
            raise BadRequest(f"Nothing was said within {silence_s:.0f} s.", code="request_too_slow") from None
        try:
            event = msgspec.json.decode(first, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError):
            event = _Event()
        if event.type != "session.update" or not event.model:
            raise BadRequest(
                "The first event must be a `session.update` with a `model`, or the URL have `?model=`.",
                param="model",
                code="missing_required_parameter",
            )
        return event.model, first

    async def hear(self, into: Heard) -> None:
        """Until it leaves."""
        try:
            while True:
                await into.put(await self._next())
        except Left:
            return

    async def pass_on(self, message: str | bytes) -> None:
        self._said_at = time.monotonic()
        await self._send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})

    async def refuse(self, error: OrchestratorError) -> None:
        if self._accepted:
            await self._say({"type": "error", "error": error.message, "code": error.code})
            later = error.status in (429, 503)
            await self.close(LATER if later else POLICY if error.status < 500 else FAULT, error.code or "")
            return
        body = error_body.body(error)
        headers = [(k.encode(), v.encode()) for k, v in error_body.headers(error).items()]
        headers += [(b"x-request-id", self._ids.request_id), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "websocket.http.response.body", "body": body})

    async def close(self, code: int, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self.code, self.reason = (1000 if code in UNSAID else code), reason
            await self._send({"type": "websocket.close", "code": self.code, "reason": reason})

    async def _say(self, event: dict[str, object]) -> None:
        await self._send({"type": "websocket.send", "text": json.dumps(event)})

    async def _next(self) -> str | bytes:
        """Raises Left."""
        message: Message = await self._receive()
        self._said_at = time.monotonic()
        if message["type"] == "websocket.disconnect":
            code = int(message.get("code") or 1005)
            if not self._closed:
                self._closed = True
                self.code, self.reason = (1001 if code == 1006 else 1000 if code in UNSAID else code), str(message.get("reason") or "")
            raise Left
        text: str | None = message.get("text")
        found: str | bytes = message["bytes"] if text is None else text
        return found
