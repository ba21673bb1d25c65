"""Sends the cases of requests.py, many at a time, and judges what comes back: whole HTTP answers without a 5xx, then the end.

A case is known by its seed and its number: `python -m tests.fuzz raw --seed 1 --only 4711` sends that one alone and shows it.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.fuzz.requests import Case, case

AT_ONCE = 96
DEADLINE_S = 20.0  # within which its answers have come and the connection is closed
TALK_S = 0.2  # who has been accepted on a WebSocket and has spoken may be silent for as long as it likes: then we leave


class Wrong(Exception):
    """What came back is no answer that a client could live with."""


@dataclass
class Counts:
    by_mutation: Counter[str] = field(default_factory=Counter)
    by_outcome: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.by_mutation.total()


async def send_all(address: tuple[str, int], model: str, seed: int, numbers: Iterable[int], counts: Counts) -> None:
    async def worker(left: Iterator[int]) -> None:
        for number in left:
            one = case(seed, number, model)
            counts.by_mutation[one.mutation] += 1
            try:
                counts.by_outcome.update(await send(address, one))
            except Wrong as wrong:
                counts.wrong.append(f"seed {seed}, case {number} ({one.mutation}): {wrong}; sent {b''.join(one.writes)[:600]!r}")

    left = iter(numbers)
    await asyncio.gather(*(worker(left) for _ in range(AT_ONCE)))


async def send(address: tuple[str, int], one: Case) -> list[str]:
    """The statuses of its answers, or that it was closed, or that we left."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        received = bytearray()
        try:
            async with asyncio.timeout(DEADLINE_S):
                sending = asyncio.create_task(_write(writer, one.writes))
                try:
                    if one.leaves:
                        await sending
                        return ["left"]
                    await _read(reader, received, one)
                finally:
                    sending.cancel()
                    await asyncio.wait((sending,))
        except TimeoutError:
            raise Wrong(f"not over within {DEADLINE_S:.0f} s; received {bytes(received[-300:])!r}") from None
        return list(statuses(bytes(received), one)) or ["closed"]
    finally:
        writer.transport.abort()


async def _write(writer: asyncio.StreamWriter, parts: list[bytes]) -> None:
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)


async def _read(reader: asyncio.StreamReader, received: bytearray, one: Case) -> None:
    """To the end of the connection, which the daemon has to make."""
    with contextlib.suppress(ConnectionError):
        while True:
            patience_s = TALK_S if received.startswith(b"HTTP/1.1 101") and len(one.writes) > 1 else None
            try:
                async with asyncio.timeout(patience_s):
                    data = await reader.read(1 << 16)
            except TimeoutError:
                return
            if not data:
                return
            received += data


def statuses(raw: bytes, one: Case) -> Iterator[str]:
    """Of all answers in what was received; the last one may have been cut, where the rest of what was sent is no HTTP."""
    requested = b"".join(one.writes)
    while raw:
        head, end, rest = raw.partition(b"\r\n\r\n")
        if not end:
            raise Wrong(f"a head without an end: {raw[:200]!r}")
        first, *lines = head.split(b"\r\n")
        words = first.split(b" ", 2)
        if words[0] != b"HTTP/1.1" or len(words) < 2 or not words[1].isdigit():
            raise Wrong(f"no status line: {first[:200]!r}")
        status = int(words[1])
        if status >= 500:
            raise Wrong(f"a {status}: {rest[:300]!r}")
        yield str(status)
        if status == 101:
            return
        headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(b":") for line in lines)}
        if status < 200:
            raw = rest
        elif b"transfer-encoding" in headers:
            raw = _after_chunks(rest)
        elif requested.startswith(b"HEAD") or status == 304:
            return
        else:
            length = int(headers[b"content-length"])
            raw = rest[length:]


def _after_chunks(rest: bytes) -> bytes:
    while True:
        size, end, after = rest.partition(b"\r\n")
        if not end:
            return b""  # cut
        try:
            length = int(size, 16)
        except ValueError:
            raise Wrong(f"no chunk: {rest[:100]!r}") from None
        if len(after) >= length + 2 and after[length : length + 2] != b"\r\n":
            raise Wrong(f"a chunk without an end: {after[length : length + 50]!r}")
        rest = after[length + 2 :]
        if length == 0 or not rest:
            return rest
