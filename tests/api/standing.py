"""The users' server in a thread of its own, over an engine that answers whatever reaches it and keeps the targets: for hypothesis, whose
examples are plain functions. A request here is bytes; its answer is read with a deadline, so that a hang is a failure."""

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import uvloop

from tests.api.doorway import doorway

DEADLINE_S = 20.0


class _Read:
    """A socket as http.client wants it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def makefile(self, mode: str) -> BinaryIO:
        return self._file


@dataclass
class Standing:
    address: tuple[str, int]
    reached: list[tuple[bytes, bytes]] = field(default_factory=list)  # target and body of each request

    def say(self, raw: bytes, method: str = "POST") -> tuple[int, bytes]:
        """Status and body of the answer to one request on a connection of its own; (0, b"") where it was only closed."""
        with socket.create_connection(self.address, DEADLINE_S) as connection:
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                connection.sendall(raw)
            with connection.makefile("rb") as file:
                answer = http.client.HTTPResponse(cast(Any, _Read(file)), method=method)
                try:
                    answer.begin()
                    return answer.status, answer.read()
                except (ConnectionError, http.client.HTTPException):
                    return 0, b""

    def post(self, target: bytes, body: bytes, *headers: bytes, method: bytes = b"POST") -> tuple[int, bytes]:
        lines = [b"%b %b HTTP/1.1" % (method, target), b"Host: h", b"Content-Length: %d" % len(body), b"Connection: close", *headers]
        return self.say(b"\r\n".join(lines) + b"\r\n\r\n" + body, method.decode())


@contextlib.contextmanager
def standing(folder: Path, max_body_bytes: int = 1 << 20) -> Iterator[Standing]:
    ready = threading.Event()
    made: list[Standing] = []
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def live() -> None:
        async with doorway(folder, max_body_bytes=max_body_bytes) as at:
            at.door()
            stop = asyncio.Event()
            stops.append((asyncio.get_running_loop(), stop))
            made.append(Standing(at.address))

            async def answer() -> None:
                while True:
                    exchange = await at.upstream.arrived.get()
                    made[0].reached.append((exchange.target, exchange.body))
                    with contextlib.suppress(ConnectionError):
                        await exchange.answer(200, b'{"id":"resp_1"}')

            answering = asyncio.create_task(answer())
            ready.set()
            await stop.wait()
            answering.cancel()

    thread = threading.Thread(target=_run, args=(live,), daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield made[0]
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def _run(live: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(live())
