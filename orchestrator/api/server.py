"""uvicorn as this daemon runs it: stopped by the daemon, awake once a second, and its connections tell more than ASGI can.

In ASGI an application hears of a client's leaving in receive() only, so each request would need a second task that waits there; the
head of an answer is a write of its own, even where its body is there already; and each part of a stream is a message, a coroutine and
a turn of a task. Those are a tenth of what a request costs, each, and half of what a part does.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CLIENT = "orchestrator.client"  # the extension of a request's scope that holds its Client
STOP_S = 3  # open streams of the admin API are cut after this
KEEP_ALIVE_S = 75  # longer than the 60 s of common load balancers, or their POSTs would meet closed connections
TICK_S = 1.0  # how often the Date header is made anew


class Client:
    """The other end of a connection, whose requests are served one after the other; to uvicorn it is the transport.

    `on_leaving` is called when it disconnects, `on_full` when it takes no more for now, `on_drained` when it does again.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.has_left = self.is_full = False
        self.on_leaving: Callable[[], object] | None = None
        self.on_full: Callable[[], object] | None = None
        self.on_drained: Callable[[], object] | None = None
        self.write: Callable[[bytes], None] = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

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


class _Protocol(HttpToolsProtocol):
    _client: Client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = Client(cast(asyncio.Transport, transport))  # uvloop's are no subclass
        super().connection_made(cast(asyncio.Transport, self._client))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CLIENT: self._client}  # type: ignore[dict-item]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.full(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client.full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._client.left()


class Server(uvicorn.Server):
    def __init__(self, app: object, access_log: bool) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                loop="uvloop",
                http=_Protocol,
                ws="none",
                lifespan="off",
                access_log=access_log,
                log_config=None,
                server_header=False,
                proxy_headers=False,  # asking.py reads what is needed of them
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=STOP_S,
                backlog=2048,
            )
        )
        self._stopping = asyncio.Event()

    def stop(self, at_once: bool = False) -> None:
        """Requests under way are given STOP_S, or no time at all."""
        self.should_exit, self.force_exit = True, at_once
        self._stopping.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: the daemon stops things in its own order."""
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # at 0 it makes the Date header, which uvicorn's own loop does at every tenth of its ticks
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()
