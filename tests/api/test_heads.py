"""Heads that are too large and requests that never end: refused within bounds of memory and time, on the users' port and the admin's."""

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from orchestrator.api import connection, server
from tests.api.doorway import doorway
from tests.api.house import house
from tests.api.rawclient import Client, Cut

ONE = {"name": "one", "source": "org/one"}
BODY = b'{"model":"one"}'
START = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"

pytestmark = pytest.mark.asyncio


async def refused(client: Client, status: int, code: str) -> None:
    answer = await client.answer()
    assert (answer.status, answer.error["code"], answer.header(b"connection")) == (status, code, b"close")
    assert answer.header(b"x-request-id")
    with pytest.raises(Cut):  # no other answer follows
        await client.head()


@pytest.mark.parametrize("sent", [b"X-%d: y\r\n", b"X-Same: %d\r\n"])
async def test_ten_thousand_headers_are_a_431(folder: Path, sent: bytes) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        client.writer.write(START + b"".join(sent % n for n in range(10_000)) + b"\r\n")
        await refused(client, 431, "head_too_large")
        assert at.upstream.untouched()


@pytest.mark.parametrize("size", [connection.HEAD_BYTES, 1 << 20])
@pytest.mark.parametrize("whole", [True, False], ids=["in one write", "in many"])
async def test_a_header_that_is_too_large_is_a_431(folder: Path, size: int, whole: bool) -> None:
    raw = START + b"X-Large: " + b"x" * size + b"\r\nContent-Length: 0\r\n\r\n"
    async with doorway(folder) as at, at.client() as client:
        at.door()
        for part in [raw] if whole else [raw[n : n + 5000] for n in range(0, len(raw), 5000)]:
            client.writer.write(part)
            await asyncio.sleep(0)
        await refused(client, 431, "head_too_large")
        assert at.upstream.untouched()


async def test_a_target_that_is_too_large_is_a_431(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        client.writer.write(b"GET /" + b"x" * connection.HEAD_BYTES + b" HTTP/1.1\r\nHost: h\r\n\r\n")
        await refused(client, 431, "head_too_large")


async def test_a_head_without_an_end_takes_no_memory(folder: Path) -> None:
    async with doorway(folder) as at:
        before = psutil.Process().memory_info().rss

        async def pour() -> None:
            async with at.client() as client:
                with contextlib.suppress(ConnectionError):  # who pours longer than the server listens after its refusal is cut
                    await client.send(START + b"X-Large: ")
                    for _ in range(256):
                        await client.send(b"x" * (1 << 20))
                    await refused(client, 431, "head_too_large")

        await asyncio.gather(*(pour() for _ in range(4)))
        assert psutil.Process().memory_info().rss - before < 64 << 20


async def test_large_bodies_before_the_head_of_the_next_are_not_counted_to_it(folder: Path) -> None:
    body = BODY + b" " * 200_000
    raw = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with doorway(folder) as at, at.client() as client:
        at.door()
        sending = asyncio.ensure_future(client.send((raw * 3) + raw[:50]))
        for _ in range(3):
            exchange = await at.upstream.request()
            assert exchange.body == body
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200
        await sending
        await client.send(raw[50:])
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_99_headers_and_60_kib_pass(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request("/v1/completions", BODY, *(f"X-{n}: {'x' * 600}" for n in range(96)))
        exchange = await at.upstream.request()
        assert exchange.header(b"x-95") == [b"x" * 600]
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


STALLS = {
    "in the head": START + b"X-Slow:",
    "in the target": b"POST /v1/comple",
    "before the body": START + b"Content-Length: 100\r\n\r\n",
    "in the body": START + b"Content-Length: 100\r\n\r\n" + BODY,
    "between chunks": START + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
}


@pytest.mark.parametrize("sent", STALLS.values(), ids=STALLS)
async def test_a_request_that_does_not_go_on_is_a_408(folder: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_S", 0.2)
    monkeypatch.setattr(server, "TICK_S", 0.05)
    async with house(folder, ONE) as at, at.client() as client:
        await client.send(sent)
        await refused(client, 408, "request_too_slow")
        assert at.upstream.untouched()
        await at.until_counts("one", 0, 0)


@pytest.mark.parametrize("sent", [b"", b"\r\n"], ids=["nothing", "a blank line"])
async def test_a_connection_that_says_nothing_is_closed(folder: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_S", 0.2)
    monkeypatch.setattr(server, "TICK_S", 0.05)
    async with doorway(folder) as at, at.client() as client:
        await client.send(sent)
        with pytest.raises(Cut):
            await client.head()


async def test_a_head_that_trickles_is_bounded_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_S", 0.3)
    monkeypatch.setattr(server, "TICK_S", 0.05)

    async def trickle() -> None:
        while True:
            client.writer.write(b"x")
            await asyncio.sleep(0.02)

    async with doorway(folder) as at, at.client() as client:
        await client.send(START + b"X-Slow: ")
        trickling = asyncio.ensure_future(trickle())
        await refused(client, 408, "request_too_slow")
        trickling.cancel()


async def test_a_body_that_goes_on_is_not_too_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_S", 0.5)
    monkeypatch.setattr(server, "TICK_S", 0.05)
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.send(START + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 20))
        for _ in range(20):  # twice as long in all
            await client.send(b" ")
            await asyncio.sleep(0.05)
        await client.send(BODY)
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_a_request_that_is_whole_may_take_its_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_S", 0.1)
    monkeypatch.setattr(server, "TICK_S", 0.02)
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request("/v1/completions", BODY)
        exchange = await at.upstream.request()
        async with at.client() as other:  # it is looked at: the one beside it is closed meanwhile
            with pytest.raises(Cut):
                await other.head()
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_blank_lines_keep_no_connection_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(server, "TICK_S", 0.05)
    async with house(folder, ONE) as at, at.client() as client:
        await client.request("/health", method="GET")
        assert (await client.answer()).status == 200
        await client.send(b"\r\n")
        with pytest.raises(Cut):
            await client.head()


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nX : a\r\n\r\n",
        b"POST /v1/comp\x00letions HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_two_readers_could_read_differently_is_a_400(folder: Path, head: bytes) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        client.writer.write(head + BODY)
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (400, "bad_http")
        assert at.upstream.untouched()
