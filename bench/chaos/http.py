"""HTTP as chaos and soak speak it: bare connections, so that each kind of end is told from the others, and a client can leave anywhere.

An answer is whole, or a Broken says how far it came. Nothing is tried again here.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

Where = int | Path  # a port of this machine, or a unix socket
MOST_HEAD = 64 * 1024


class Broken(Exception):
    """The connection was refused, or ended before the answer did; `begun`: after its first byte."""

    def __init__(self, why: str, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class Connection:
    """One connection, one request at a time. `status`, `headers`: of the answer that is being read."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status, self.headers = 0, dict[str, str]()
        self.used = 0  # requests before this one

    async def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        """Returns when the head of the answer is there. Raises Broken."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.status = 0
        try:
            if self._writer is None:
                await self._open()
            assert self._reader is not None
            assert self._writer is not None
            self._writer.write("\r\n".join([*lines, "", ""]).encode() + data)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise Broken(f"{type(error).__name__}: {error}", False) from None
        self.status = int(head[0].split(" ", 2)[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Broken where it ends before its end."""
        assert self._reader is not None
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readuntil(b"\r\n")
            elif length := int(self.headers.get("content-length", "0")):
                yield await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.close()
            raise Broken(f"{type(error).__name__} in the body: {error}", True) from None
        self.used += 1
        if self.headers.get("connection", "").lower() == "close":
            self.close()

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event. Raises Broken."""
        rest = b""
        async for part in self.parts():
            *whole, rest = (rest + part).split(b"\n\n")
            for event in whole:
                for line in event.decode().split("\n"):
                    if line.startswith("data: "):
                        yield line[6:]

    async def whole(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    def close(self) -> None:
        """At once, as a client that leaves."""
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._writer.transport.abort()
        self._reader = self._writer = None
        self.used = 0

    async def _open(self) -> None:
        if isinstance(self._where, int):
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._where, limit=MOST_HEAD)
        else:
            self._reader, self._writer = await asyncio.open_unix_connection(str(self._where), limit=MOST_HEAD)


async def call(where: Where, method: str, path: str, body: Any = None, timeout_s: float = 30.0) -> tuple[int, Any]:
    """Status and JSON, or else text, of one call over a connection of its own. Raises Broken, TimeoutError."""
    connection = Connection(where)
    try:
        async with asyncio.timeout(timeout_s):
            await connection.send(method, path, body)
            text = await connection.whole()
            try:
                return connection.status, json.loads(text)
            except ValueError:  # nothing, or words
                return connection.status, text.decode(errors="replace")
    finally:
        connection.close()
