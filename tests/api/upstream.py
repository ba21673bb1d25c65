"""A scripted engine: raw asyncio on a unix socket. A test reads each request as it came in, byte by byte, and says what is answered.

Nothing is answered by itself, so a test holds every moment in its hand. Each wait has a deadline: passing it is a failure.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 20.0
Headers = list[tuple[bytes, bytes]]


@dataclass
class Exchange:
    """One request as it reached the engine, and the way back to the client."""

    target: bytes
    headers: Headers
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    over: asyncio.Event

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), DEADLINE_S)

    async def head(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        lines = [b"HTTP/1.1 %d Whatever" % status, *(b"%s: %s" % pair for pair in headers)]
        await self.send(b"\r\n".join(lines) + b"\r\n\r\n")

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """A whole answer; the connection stays open for the next request."""
        await self.head(status, (b"Content-Type", b"application/json"), (b"Content-Length", b"%d" % len(body)), *headers)
        await self.send(body)
        self.over.set()

    async def stream(self, *headers: tuple[bytes, bytes]) -> None:
        """The head of an event stream; chunk() and end() follow."""
        await self.head(200, (b"Content-Type", b"text/event-stream; charset=utf-8"), (b"Transfer-Encoding", b"chunked"), *headers)

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")
        self.over.set()

    def die(self) -> None:
        """The engine is killed: its connection breaks off."""
        self.writer.transport.abort()
        self.over.set()

    async def left(self) -> None:
        """Until the other side has closed the connection."""
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(self.reader.read(), DEADLINE_S) == b""
        self.over.set()


class Upstream:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.arrived: asyncio.Queue[Exchange] = asyncio.Queue()
        self._serving: set[asyncio.Task[None]] = set()

    async def request(self) -> Exchange:
        return await asyncio.wait_for(self.arrived.get(), DEADLINE_S)

    @property
    def open(self) -> int:
        """Connections that are there now."""
        return len(self._serving)

    def untouched(self) -> bool:
        return self.arrived.empty() and self.connections == 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while (exchange := await _read(reader, writer)) is not None:
                self.arrived.put_nowait(exchange)
                await exchange.over.wait()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._serving.discard(task)
            writer.transport.abort()

    async def close(self) -> None:
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    request, *lines = head[:-4].split(b"\r\n")
    headers = [(key, value.strip(b" ")) for key, _, value in (line.partition(b":") for line in lines)]
    declared = next((value for key, value in headers if key.lower() == b"content-length"), None)
    assert declared is not None or request.startswith(b"GET "), head
    body = await reader.readexactly(int(declared or 0))
    return Exchange(request.split(b" ")[1], headers, body, reader, writer, asyncio.Event())


@contextlib.asynccontextmanager
async def scripted(path: Path) -> AsyncIterator[Upstream]:
    upstream = Upstream(path)
    server = await asyncio.start_unix_server(upstream.serve, path)
    try:
        yield upstream
    finally:
        server.close()
        await upstream.close()
        await server.wait_closed()
