"""Answers of an engine, right ones and what becomes of them, and what the daemon makes of each: the engine's answer, a 502, or a cut.

After each the same client's next request is answered right: nothing that an engine said stays on the way and is taken for another's answer.
An answer that was only cut short never reaches the client as a whole one.
"""

import asyncio
import contextlib
import random
from pathlib import Path

from tests.api.doorway import Doorway, doorway
from tests.api.rawclient import Answer, Client, Cut
from tests.api.upstream import Exchange
from tests.fuzz.raw import Counts

BODY = b'{"model":"one"}'
EVENTS = b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
JSON = b'{"id":"resp_1","choices":[{"text":"hello"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
KINDS = {"cut short", "strange bytes", "pieces twice or gone", "strange head", "no http", "unchanged"}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")


def _plain(status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(JSON), JSON)


def _chunked(kind: bytes, body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def answer(chance: random.Random) -> tuple[str, bytes]:
    stream = _chunked(b"text/event-stream", EVENTS, chance.randint(1, 80))
    right = chance.choice([_plain(), _plain(b"400 Bad Request"), stream, _chunked(b"application/json", JSON, 20)])
    kind = chance.choice(sorted(KINDS))
    if kind == "unchanged":
        return kind, right
    if kind == "cut short":
        return kind, right[: chance.randrange(len(right))]
    if kind == "no http":
        return kind, chance.choice([b"", b"\x00" * 50, b"SSH-2.0-x\r\n", b"HTTP/1.1\r\n\r\n", b"<html>", chance.randbytes(300)])
    if kind == "strange head":
        extra = chance.choice(
            [b"Content-Length: 5", b"Content-Length: -1", b"Transfer-Encoding: gzip", b"X: \x00", b"X: \xff\xfe", b"Connection: close",
             b"X" * 100_000, b"HTTP/1.1 100 Continue", b": x", b"Set-Cookie: a=\r\n b", b"Upgrade: h2c\r\nConnection: upgrade",
             b"Content-Length: 99999999999999999999"]
        )  # fmt: skip
        return kind, right.replace(b"\r\n", b"\r\n" + extra + b"\r\n", 1)
    raw = bytearray(right)
    if kind == "strange bytes":
        for _ in range(chance.randint(1, 5)):
            at = chance.randrange(len(raw))
            put = [b"\x00", b"\r\n", b"\n", b"\xff", b"0", b"f", b": ", b"", chance.randbytes(3)]
            raw[at : at + chance.randrange(3)] = chance.choice(put)
        return kind, bytes(raw)
    first, last = sorted((chance.randrange(len(raw)), chance.randrange(len(raw))))
    return kind, chance.choice([right[:first] + right[last:], right[:last] + right[first:]])


async def say_all(folder: Path, seed: int, numbers: range, counts: Counts) -> None:
    async with doorway(folder) as at:
        at.door()
        for number in numbers:
            chance = random.Random(f"{seed}:{number}")
            kind, raw = answer(chance)
            counts.by_mutation[kind] += 1
            try:
                counts.by_outcome[await _say(at, chance, kind, raw)] += 1
            except AssertionError as wrong:
                counts.wrong.append(f"seed {seed}, answer {number} ({kind}): {wrong}; the engine said {raw[:500]!r}")
        await at.until_counts(0, 0)


async def _say(at: Doorway, chance: random.Random, kind: str, raw: bytes) -> str:
    async with at.client() as client:
        await client.request(chance.choice(PATHS), BODY)
        saying = asyncio.create_task(_engine(at, chance, kind, raw))
        try:
            outcome = await _heard(client, kind)
        finally:
            saying.cancel()
            await asyncio.wait((saying,))
    # Several, because connections are kept and used again: what stayed behind in one of them would be met.
    for word in (b"first", b"second"):
        async with at.client() as other:
            await other.request("/v1/completions", BODY)
            heard = await _clean(at, other, word)
            assert heard == word, f"the next request got {heard!r}"
    return outcome


async def _engine(at: Doorway, chance: random.Random, kind: str, raw: bytes) -> None:
    """Each time that it is asked: where nothing came back on a connection that was kept, it is asked once more."""
    while True:
        exchange = await at.upstream.arrived.get()
        cut = chance.randrange(len(raw) + 1)
        try:
            await exchange.send(raw[:cut])
            await exchange.send(raw[cut:])
            if kind != "unchanged":
                exchange.writer.write_eof()  # or what is missing would be waited for, as of a slow engine
        except (ConnectionError, OSError):
            pass
        exchange.over.set()


async def _heard(client: Client, kind: str) -> str:
    try:
        async with asyncio.timeout(20):
            answer: Answer = await client.answer()
    except Cut:
        return "cut"
    except TimeoutError:
        raise AssertionError("nothing was answered") from None
    assert answer.status != 500, answer.body
    assert kind != "cut short" or answer.status == 502, f"a whole {answer.status} of what was cut: {answer.body!r}"
    assert kind != "no http" or answer.status == 502, f"a {answer.status} of what is no HTTP"
    return str(answer.status)


async def _clean(at: Doorway, client: Client, word: bytes) -> bytes:
    exchange: Exchange = await at.upstream.request()
    with contextlib.suppress(ConnectionError):
        await exchange.answer(200, word)
    return (await client.answer()).body
