"""A request that need not wait, and its answer: from connection to connection, in the callbacks that bring the bytes.

Without a task, a future or an ASGI message: those are half of what a request costs. Only what goes the usual way goes here: whatever
must wait, is refused, or hears something first takes the way of ASGI (proxy.py), which begins anew with the same bytes. To uvicorn's
connection an exchange is its cycle: a request that comes behind it waits for its end. However it ends, `ended` is called once.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from orchestrator.api import error_body
from orchestrator.api.connection import STATUS_LINE, Connection
from orchestrator.api.ids import Ids
from orchestrator.api.routes import Route
from orchestrator.api.upstream import Answer, Upstream
from orchestrator.api.usage import Meter
from orchestrator.control.counts import LEFT
from orchestrator.errors import EngineDied, OrchestratorError

log = logging.getLogger("orchestrator.proxy")

UNBUFFERED = (b"x-accel-buffering", b"no")  # nginx, before us, must not collect a stream
BODILESS = (204, 304)


class _Nobody:
    """Waits for what uvicorn tells its cycles."""

    def set(self) -> None: ...


# status as it ended, when its stream's first event came (time.monotonic), code of our own error
Ended = Callable[[int, float | None, str | None], None]


class Exchange:
    """`request`: head and body for the engine of `model`."""

    __slots__ = (
        "_answer", "_begun", "_chunked", "_connecting", "_connection", "_ended", "_first_at", "_ids", "_is_kept", "_meter", "_model",
        "_request", "_route", "_streams", "_upstream", "disconnected", "keep_alive", "response_complete", "response_started",
    )  # fmt: skip
    message_event = _Nobody()

    def __init__(
        self,
        connection: Connection,
        upstream: Upstream,
        model: str,
        route: Route,
        request: tuple[bytes, bytes],
        ids: Ids,
        meter: Meter | None,
        ended: Ended,
    ) -> None:
        self._connection, self._upstream, self._model, self._route = connection, upstream, model, route
        self._request, self._ids, self._meter, self._ended = request, ids, meter, ended
        self._answer: Answer | None = None
        self._connecting: asyncio.Task[Answer] | None = None
        self._first_at: float | None = None
        self._is_kept = self._chunked = self._streams = self._begun = False
        self.response_started = self.response_complete = self.disconnected = False
        self.keep_alive = True

    def begin(self) -> None:
        self._connection.peer.on_leaving = self._finish
        answer = self._upstream.kept()
        if answer is None:
            self._connect()
        else:
            self._is_kept = True
            self._ask(answer)

    # ---- to the engine ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._is_kept = False
        self._connecting = self._connection.loop.create_task(self._upstream.connect())
        self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[Answer]) -> None:
        self._connecting = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._refuse(error)
        elif self.response_complete:  # its client left in the very turn of the loop in which it was connected
            task.result().release()
        else:
            self._ask(task.result())

    def _ask(self, answer: Answer) -> None:
        self._answer, peer = answer, self._connection.peer
        peer.on_full, peer.on_drained = answer.pause, answer.resume
        answer.send(*self._request, self._meter, self._news)

    # ---- to the client ------------------------------------------------------------------------------------------------

    def _news(self) -> None:
        """Something of the answer has come, or it broke."""
        try:
            answer = self._answer
            assert answer is not None
            if self.response_started or answer.has_head:
                self._pass_on(answer)
            elif answer.broke is not None:
                self._not_answered(answer, answer.broke)
        except Exception:
            log.exception("an answer could not be passed on")
            self._cut(error_body.BUG)

    def _pass_on(self, answer: Answer) -> None:
        out, data = b"", answer.take()
        if not self._begun:  # its head and its first part may come one after the other
            if not self.response_started:
                self.response_started = True
                out = self._head(answer)
            if data:
                self._begun = True
                if self._streams:
                    self._first_at = monotonic()
        if self._chunked:
            if data:
                out += b"%x\r\n%b\r\n" % (len(data), data)
            if answer.over:
                out += b"0\r\n\r\n"
        else:
            out += data
        if out:
            self._connection.peer.write(out)
        if answer.over:
            self._finish(answer.status)
            self._connection.end_exchange(self.keep_alive)
        elif answer.broke is not None:
            self._break_off(answer.broke)

    def _head(self, answer: Answer) -> bytes:
        self._streams = answer.content_type.startswith(b"text/event-stream")
        self._chunked = (self._streams or not answer.has_length) and answer.status not in BODILESS
        ids, parts = self._ids, [STATUS_LINE[answer.status]]
        for name, value in self._connection.server_state.default_headers:
            parts += name, b": ", value, b"\r\n"
        parts.append(b"x-request-id: %b\r\ntraceparent: %b\r\n" % (ids.request_id, ids.traceparent))
        if self._route.is_anthropic:
            parts.append(b"request-id: %b\r\n" % ids.request_id)  # as its SDKs read it
        for name, value in answer.headers:
            if not self._chunked or name != b"content-length":
                parts += name, b": ", value, b"\r\n"
        if self._streams:
            parts += UNBUFFERED[0], b": ", UNBUFFERED[1], b"\r\n"
        if self._chunked:
            parts.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)

    # ---- its end ------------------------------------------------------------------------------------------------------

    def _finish(self, status: int = LEFT, code: str | None = None) -> None:
        """It ended, or its client left: an answer that is not at its end is closed, which tells the engine to stop."""
        if self.response_complete:
            return
        self.response_complete = True
        peer = self._connection.peer
        peer.on_leaving = peer.on_full = peer.on_drained = None
        if self._connecting is not None:
            self._connecting.cancel()
        if self._answer is not None:
            self._answer.release()
        self._ended(status, self._first_at, code)

    def _not_answered(self, answer: Answer, why: str) -> None:
        """A kept connection may have ended in the very moment that it was used: then nothing came back, and it is sent once more."""
        if self._is_kept and not answer.begun:
            self._answer = None
            self._connect()
        else:
            self._refuse(why)

    def _refuse(self, why: object) -> None:
        died = EngineDied.broke_off(self._model, why)
        self._finish(died.status, died.code)
        self._connection.refuse(died, self._route.is_anthropic, self._ids)

    def _break_off(self, why: str) -> None:
        """Never a silent short success: an event that says so, and an answer without its end."""
        died = EngineDied.broke_off(self._model, why)
        if self._streams:
            self._connection.peer.write_chunk(error_body.last_event(died, self._route.is_anthropic, self._ids.request_id))
        self._cut(died)

    def _cut(self, error: OrchestratorError) -> None:
        self._finish(error.status, error.code)
        self._connection.transport.close()
