"""A client's connection: uvicorn's, with what ASGI cannot tell, and with bounds that uvicorn does not have.

In ASGI an application hears of a client's leaving in receive() only, so each request would need a second task that waits there; the
head of an answer is a write of its own, even where its body is there already; and each part of a stream is a message, a coroutine and
a turn of a task. Those are a tenth of what a request costs, each, and half of what a part does.

uvicorn takes a head of any size, and waits for the rest of a request for ever. Here a head is refused when it is too large, and a
request that does not go on; by one look at all connections in each tick of the server, without a timer for each. Each request has an
id, and each answer bears it, whoever makes it.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any, Protocol, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE as STATUS_LINE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from orchestrator.api.ids import IDS, Ids, ids
from orchestrator.api.refusal import head_too_large, too_slow, whole
from orchestrator.api.routes import DIRECT, is_anthropic
from orchestrator.errors import BadRequest, OrchestratorError

CLIENT = "orchestrator.client"  # the extension of a request's scope that holds its Client
KEEP_ALIVE_S = 75  # longer than the 60 s of common load balancers, or their POSTs would meet closed connections
LINGER_S = 2.0  # how long a connection is read from that was refused
SLOW_S = 60.0  # how long a head may take from its first byte, and a body between two of its parts
MOST_HEADERS = 100  # SDKs send 20; the WebSocket parser takes 128
HEAD_BYTES = 64 << 10
LINE_BYTES = 8190  # of one header of a WebSocket's handshake: its parser takes no more
OFFER = frozenset({b"upgrade", b"http2-settings"})
OURS = frozenset({b"expect", b"x-request-id", b"traceparent"})


class Cycle(Protocol):
    """Of a request that was taken."""

    def begin(self) -> None: ...


class Client:
    """The other end of a connection, whose requests are served one after the other; to uvicorn it is the transport.

    `on_leaving` is called when it disconnects, `on_full` when it takes no more for now, `on_drained` when it does again.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.is_new = True
        self.has_left = self.is_full = False
        self.on_leaving: Callable[[], object] | None = None
        self.on_full: Callable[[], object] | None = None
        self.on_drained: Callable[[], object] | None = None
        self.write: Callable[[bytes], None] = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """To uvicorn, which asks for addresses first, the other end's alone: finding our own is a tenth of what a connection costs."""
        if self.is_new and name in ("socket", "sockname"):
            return default
        return self._transport.get_extra_info(name, default)

    def join_next_writes(self) -> None:
        """The next write waits for the one after it: both leave in one system call."""

        def first(head: bytes) -> None:
            def second(body: bytes) -> None:
                self.write = self._transport.write
                self._transport.writelines((head, body))

            self.write = second

        self.write = first

    def write_chunk(self, data: bytes) -> None:
        """A part of an answer in chunks, whose head and end go the way of ASGI: without a message and a coroutine for each part."""
        if not self.has_left:
            self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def left(self) -> None:
        self.has_left = True
        if self.on_leaving is not None:
            self.on_leaving()

    def full(self, is_full: bool) -> None:
        self.is_full = is_full
        then = self.on_full if is_full else self.on_drained
        if then is not None:
            then()


class Connection(HttpToolsProtocol):
    """`direct` is offered each request to a route of DIRECT that came whole in one piece, and says whether it has taken it: then it is
    the connection's cycle until end_exchange(), or refuse()."""

    peer: Client

    def __init__(self, *given: Any, direct: "Direct | None" = None, **named: Any) -> None:
        super().__init__(*given, **named)
        self._direct = direct
        self._held: bytes | None = None  # the body of a request that may be taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.peer = Client(cast(asyncio.Transport, transport))  # uvloop's are no subclass
        self._in_head, self._in_body, self._begun, self._is_refused = True, False, False, False
        self._since = self.loop.time()
        self._head_bytes, self._is_large, self._is_offer, self._data = 0, False, False, b""
        self._refused: OrchestratorError | None = None
        self._ahead: list[RequestResponseCycle] = []
        super().connection_made(cast(asyncio.Transport, self.peer))
        self.peer.is_new = False

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        was_in_head = self._in_head
        self._is_large, self._data = len(data) > HEAD_BYTES, data
        super().data_received(data)
        self._data = b""
        if self._held is not None:
            self._by_asgi(self._held)  # there is more to come
        if self._in_body:
            self._since = self.loop.time()
        elif self._in_head and not self._is_refused:
            # The parser keeps a header to itself until it is whole. Of the first part, some may be the request's before.
            self._head_bytes += len(data) if was_in_head else 1
            if self._head_bytes > HEAD_BYTES:
                self._refuse(head_too_large(MOST_HEADERS, HEAD_BYTES))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._begun = True
        self._since = self.loop.time()
        self._head_bytes = 0
        self._given_id: bytes | None = None
        self._given_trace: bytes | None = None
        self.scope["extensions"] = {CLIENT: self.peer}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if len(self.headers) >= MOST_HEADERS:
            self._end_head()
        if name in OURS:
            if name == b"x-request-id":
                self._given_id = value
            elif name == b"traceparent":
                self._given_trace = value
            elif value.lower() == b"100-continue":
                self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if (self._is_large or self._head_bytes) and len(self.url) + sum(len(k) + len(v) for k, v in self.headers) > HEAD_BYTES:
            self._end_head()
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and not self._should_upgrade():
            self._is_offer = True
            self.scope["method"] = self.parser.get_method().decode()
            return
        self._in_head, self._in_body = False, True
        if self._direct is not None and self.url in DIRECT and self._may_be_direct():
            self._held = b""
        else:
            self._begin_cycle()

    def _may_be_direct(self) -> bool:
        parser, free = self.parser, self.cycle is None or self.cycle.response_complete
        return (
            free
            and not self.expect_100_continue
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
        )

    def _begin_cycle(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        cycle = self.cycle
        if cycle is not before:  # else it becomes a WebSocket
            if before is not None and not before.response_complete:
                self._ahead = [*(one for one in self._ahead if not one.response_complete), before]
            made = self.ids()
            self.scope["extensions"][IDS] = made  # type: ignore[assignment]
            cycle.default_headers = [*cycle.default_headers, (b"x-request-id", made.request_id), (b"traceparent", made.traceparent)]
            if is_anthropic(self.scope["path"]):
                cycle.default_headers.append((b"request-id", made.request_id))  # as its SDKs read it

    def ids(self) -> Ids:
        return ids(self._given_id, self._given_trace)

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._held = self._held + body if self._held else body

    def on_message_complete(self) -> None:
        if self._is_offer:
            return
        self._in_body = self._begun = False
        self._since = self.loop.time()
        if (body := self._held) is not None:
            self._held = None
            assert self._direct is not None
            if (exchange := self._direct(self, body)) is not None:
                self.cycle = exchange  # type: ignore[assignment]  # all of it that uvicorn asks for
                exchange.begin()
                return
            self._by_asgi(body)
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # a large body's last part has stopped it, and a client's leaving is read, too

    def _by_asgi(self, body: bytes) -> None:
        """With what of the request has come, as if it had never been held."""
        self._held = None
        self._begin_cycle()
        if body:
            super().on_body(body)

    def end_exchange(self, keep_alive: bool) -> None:
        """What uvicorn does at the end of a cycle, but without a timer for each: look() ends a connection that nobody uses."""
        self.server_state.total_requests += 1
        self._since = self.loop.time()
        if not keep_alive:
            self.transport.close()
        elif self.pipeline and not self.transport.is_closing():
            self.flow.resume_reading()
            self._start_asgi_task(*self.pipeline.pop())

    def refuse(self, error: OrchestratorError, anthropic: bool, given: Ids) -> None:
        """The answer of an exchange whose engine gave none."""
        if not self.transport.is_closing():
            self.transport.write(whole(error, self.server_state.default_headers, anthropic, given))
            self.transport.close()

    def _end_head(self) -> None:
        self._refused = head_too_large(MOST_HEADERS, HEAD_BYTES)
        raise ValueError  # ends the parser; send_400_response follows

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refused or BadRequest(f"This is not HTTP: {msg}", code="bad_http"))

    def _unsupported_upgrade_warning(self) -> None:
        """An offer of HTTP/2, as Java's client makes with its first request. The parser has ended with its head: begin anew, without it."""
        ended = sys.exc_info()[1]
        if not self._is_offer or ended is None:
            return
        self._is_offer = False
        kept = [(name, _without_offer(value) if name == b"connection" else value) for name, value in self.headers if name not in OFFER]
        lines = [b"%b %b HTTP/1.1" % (self.scope["method"].encode(), self.url), *(b"%b: %b" % pair for pair in kept)]
        rest = self._data[ended.args[0] :]
        self.parser = type(self.parser)(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def handle_websocket_upgrade(self) -> None:
        if self.scope["method"] != "GET":
            self._refuse(BadRequest("A WebSocket begins with a GET.", code="bad_http"))
        elif max(len(name) + len(value) for name, value in self.headers) > LINE_BYTES or len(self.url) > LINE_BYTES:
            self._refuse(head_too_large(MOST_HEADERS, HEAD_BYTES))
        else:
            super().handle_websocket_upgrade()

    def look(self, now: float) -> None:
        """Once a tick: close it where the rest of a request does not come."""
        if self._is_refused:
            if now - self._since > LINGER_S:
                self.transport.close()
        elif self._in_body and self.flow.read_paused:
            self._since = now  # it is we who do not read
        elif self._in_head or self._in_body:
            if now - self._since > SLOW_S and self._begun:
                self._refuse(too_slow(SLOW_S))
            elif now - self._since > SLOW_S:
                self.transport.close()
        elif self.cycle.response_complete and self.timeout_keep_alive_task is None and now - self._since > KEEP_ALIVE_S:
            self.transport.close()  # blank lines have ended its timeout

    def _refuse(self, error: OrchestratorError) -> None:
        """Say so, where no answer is under way, and close. What still comes is read for a moment: a connection that is closed on it
        is reset, and the client would not hear why."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not self._in_body:
                self.transport.close()
                return
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False  # nothing may be written any more
            cycle.message_event.set()
        self._unset_keepalive_if_required()
        self._held = None
        self._is_refused, self._since = True, self.loop.time()
        self.flow.resume_reading()
        self.transport.write(whole(error, self.server_state.default_headers))
        self.transport.write_eof()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.peer.full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.peer.full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self._ahead:  # of several requests in one write uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)
        self.peer.left()
        self.cycle = self.parser = None  # type: ignore[assignment]  # they know it: a ring that only the collector could open


Direct = Callable[[Connection, bytes], Cycle | None]


def _without_offer(connection: bytes) -> bytes:
    return b", ".join(word.strip() for word in connection.split(b",") if word.strip().lower() not in OFFER)
