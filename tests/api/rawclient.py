"""A client of raw bytes, so that a test can leave at any moment, send what no library would send, and see each chunk as it comes.

`Cut` is what a broken end looks like: the connection closed before the body was whole.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE_S = 20.0


class Cut(Exception):
    """The connection ended before the answer did."""


@dataclass
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    def header(self, name: bytes) -> bytes | None:
        found = [value for key, value in self.headers if key == name]
        assert len(found) < 2, f"{name!r} came {len(found)} times"
        return found[0] if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The body as an OpenAI error object: exactly these fields, and `errors` where several things are wrong."""
        assert self.header(b"content-type") == b"application/json"
        (inside,) = self.json.values()
        assert set(inside) - {"errors"} == {"message", "type", "param", "code"}, inside
        assert isinstance(inside["message"], str)
        found: dict[str, Any] = inside
        return found


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), DEADLINE_S)

    async def request(self, target: str, body: bytes = b"", *headers: str, method: str = "POST") -> None:
        """A whole request with its length declared."""
        lines = [f"{method} {target} HTTP/1.1", "Host: h", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def head(self) -> Answer:
        try:
            raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Cut from error
        first, *lines = raw[:-4].split(b"\r\n")
        pairs = [line.partition(b":") for line in lines]
        return Answer(int(first.split(b" ")[1]), [(key.lower(), value.strip()) for key, _, value in pairs])

    async def answer(self) -> Answer:
        answer = await self.head()
        if answer.header(b"transfer-encoding") == b"chunked":
            answer.body = b"".join([chunk async for chunk in self.chunks()])
        else:
            length = answer.header(b"content-length")
            assert length is not None, "a body that only the end of the connection ends may be cut unseen"
            answer.body = await self._exactly(int(length))
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        while chunk := await self.chunk():
            yield chunk

    async def chunk(self) -> bytes:
        """The next chunk; b"" for the last. Raises Cut."""
        try:
            size = int(await asyncio.wait_for(self.reader.readuntil(b"\r\n"), DEADLINE_S), 16)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Cut from error
        return (await self._exactly(size + 2))[:-2]

    async def _exactly(self, size: int) -> bytes:
        try:
            return await asyncio.wait_for(self.reader.readexactly(size), DEADLINE_S)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Cut from error

    def leave(self) -> None:
        """As a process that is killed leaves: no goodbye in HTTP."""
        self.writer.close()


@contextlib.asynccontextmanager
async def connected(address: "tuple[str, int] | Path") -> AsyncIterator[Client]:
    reader, writer = await (asyncio.open_unix_connection(address) if isinstance(address, Path) else asyncio.open_connection(*address))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
