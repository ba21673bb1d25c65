"""Asks an OpenAI endpoint for completions, as streams, and says what became of each. One request, one connection; standard library.

The endpoint is a URL (the daemon's) or a unix socket (an engine's). Prompts are token ids: their length is exact for every tokenizer.
It does no more than that, so that a hundred streams at once are not bound by their client.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LINE_BYTES = 1 << 20  # of a stream; an event with its logprobs is a few KiB
FIRST_ID, IDS = 100, 800  # ids below are special ones of many tokenizers; every vocabulary has those


@dataclass(frozen=True)
class Answer:
    """One request's fate. `at_s`: when it was sent, in seconds of time.monotonic(); then seconds from there to the first token and to
    the end. `code`: of the error."""

    model: str
    at_s: float
    first_s: float | None
    total_s: float
    tokens: int
    error: str | None = None
    code: str | None = None

    @property
    def token_s(self) -> float | None:
        """For each token after the first."""
        return (self.total_s - self.first_s) / (self.tokens - 1) if self.first_s is not None and self.tokens > 1 else None


@dataclass(frozen=True)
class Endpoint:
    """`url` without /v1, or `socket`. `key`: an API key."""

    url: str = ""
    socket: Path | None = None
    key: str | None = None


class _Refused(Exception):
    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def prompt(tokens: int, salt: str) -> list[int]:
    """Token ids; prompts with another salt share no prefix."""
    dice = random.Random(salt)
    return [FIRST_ID + dice.randrange(IDS) for _ in range(tokens)]


async def ask(endpoint: Endpoint, model: str, ids: Sequence[int], max_tokens: int, timeout_s: float) -> Answer:
    """A stream of exactly `max_tokens` tokens (ignore_eos). Never raises: whatever happens to it is its answer."""
    body = {
        "model": model, "prompt": list(ids), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, tokens = time.monotonic(), None, 0
    error: str | None = None
    code: str | None = None
    try:
        async with asyncio.timeout(timeout_s), contextlib.aclosing(_events(endpoint, body)) as events:
            async for event in events:
                if event.get("choices"):
                    first = first if first is not None else time.monotonic() - began
                if usage := event.get("usage"):
                    tokens = int(usage["completion_tokens"])
                if refusal := event.get("error"):
                    raise _Refused(str(refusal.get("message")), str(refusal.get("code") or "error"))
        if tokens == 0:
            raise _Refused("the stream ended before its usage was told", "cut")
    except _Refused as fault:
        error, code = str(fault), fault.code
    except TimeoutError:
        error, code = f"no end within {timeout_s:g} s", "timeout"
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as fault:
        error, code = f"{type(fault).__name__}: {fault}", "connection"
    return Answer(model, began, first, time.monotonic() - began, tokens, error, code)


async def healthy(endpoint: Endpoint) -> bool:
    with contextlib.suppress(OSError, EOFError, ValueError, TimeoutError):
        async with asyncio.timeout(2.0), _exchange(endpoint, "GET", "/health", b"") as (status, _, _):
            return status == 200
    return False


async def _events(endpoint: Endpoint, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """The stream's JSON objects. Raises _Refused where there is no stream, OSError or EOFError where it breaks off."""
    async with _exchange(endpoint, "POST", "/v1/completions", json.dumps(body, separators=(",", ":")).encode()) as (
        status,
        chunked,
        reader,
    ):
        if status != 200:
            raise _refusal(status, await _rest(reader, chunked))
        async for line in _lines(reader, chunked):
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield json.loads(data)


@contextlib.asynccontextmanager
async def _exchange(endpoint: Endpoint, method: str, path: str, body: bytes) -> AsyncIterator[tuple[int, bool, asyncio.StreamReader]]:
    """The status, whether what follows comes in chunks, and what follows. Raises OSError, EOFError, ValueError."""
    url = urlsplit(endpoint.url or "http://engine")
    if endpoint.socket is not None:
        reader, writer = await asyncio.open_unix_connection(str(endpoint.socket), limit=LINE_BYTES)
    else:
        reader, writer = await asyncio.open_connection(url.hostname, url.port or 80, limit=LINE_BYTES)
    try:
        head = [f"{method} {url.path.rstrip('/')}{path} HTTP/1.1", f"Host: {url.netloc}", "Connection: close"]
        head += [f"Authorization: Bearer {endpoint.key}"] if endpoint.key else []
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := (await reader.readline()).strip()) != b"":
            chunked = chunked or line.lower().replace(b" ", b"") == b"transfer-encoding:chunked"
        yield status, chunked, reader
    except IndexError:
        raise ConnectionResetError("the connection was closed without an answer") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes. Raises EOFError where chunks end without the last."""
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readline()).strip() or b"x", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    rest = b""
    async for part in _parts(reader, chunked):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line


async def _rest(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    return b"".join([part async for part in _parts(reader, chunked)])


def _refusal(status: int, data: bytes) -> _Refused:
    try:
        error = json.loads(data)["error"]
        return _Refused(str(error["message"]), str(error.get("code") or f"http_{status}"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return _Refused(f"HTTP {status}: {data[:200]!r}", f"http_{status}")
