"""A client may leave at any moment: its request ends upstream, and its lease comes back so that the next one gets the place."""

import asyncio
from pathlib import Path

import pytest

from tests.api.house import house

ONE = {"name": "one", "source": "org/one", "max_concurrency": 1}
CHAT = "/v1/chat/completions"
BODY = b'{"model":"one"}'

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("way")]


async def test_while_the_body_is_still_being_sent(folder: Path) -> None:
    async with house(folder, ONE) as at:
        async with at.client() as client:
            await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n" + BODY)
        async with at.client() as client:  # the server has seen the first one's end when it answers the second's
            await client.request(CHAT, BODY)
            await (await at.upstream.request()).answer(200, b"{}")
            assert (await client.answer()).status == 200
        assert at.upstream.connections == 1
        await at.until_counts("one", 0, 0)


async def test_while_queued_behind_another(folder: Path) -> None:
    async with house(folder, ONE) as at, at.client() as first, at.client() as last:
        await first.request(CHAT, BODY)
        held = await at.upstream.request()
        async with at.client() as leaver:
            await leaver.request(CHAT, BODY, "X-Who: leaver")
            await at.until_counts("one", 1, 1)
            leaver.leave()
            await at.until_counts("one", 1, 0)
        await last.request(CHAT, BODY, "X-Who: last")
        await at.until_counts("one", 1, 1)
        await held.answer(200, b"{}")
        following = await at.upstream.request()
        assert following.header(b"x-who") == [b"last"]  # the one that left never reached the engine
        await following.answer(200, b"{}")
        assert (await last.answer()).status == 200
        await at.until_counts("one", 0, 0)


async def test_while_the_model_starts(folder: Path) -> None:
    async with house(folder, ONE, ready=False) as at:
        at.engines.slow.add("one")
        async with at.client() as leaver:
            await leaver.request(CHAT, BODY)
            await at.until_state("one", "starting")
            assert (at.seen("one").in_flight, at.seen("one").waiting) == (0, 1)
            leaver.leave()
            await at.until_counts("one", 0, 0)
        assert at.upstream.connections == 0


async def test_while_the_model_wakes(folder: Path) -> None:
    async with house(folder, ONE) as at:
        assert (await at.operate("POST", "/models/one/sleep")).status == 202
        await at.until_state("one", "asleep")
        at.engines.slow.add("one")
        async with at.client() as leaver:
            await leaver.request(CHAT, BODY)
            await at.until_state("one", "waking")
            assert (at.seen("one").in_flight, at.seen("one").waiting) == (0, 1)
            leaver.leave()
            await at.until_counts("one", 0, 0)
        assert at.upstream.connections == 0


@pytest.mark.parametrize("phase", ["before the first byte", "after the head", "mid-stream"])
async def test_from_a_stream(folder: Path, phase: str) -> None:
    async with house(folder, ONE) as at, at.client() as leaver:
        await leaver.request(CHAT, b'{"model":"one","stream":true}')
        exchange = await at.upstream.request()
        await at.until_counts("one", 1, 0)
        if phase != "before the first byte":
            await exchange.stream()
            await leaver.head()
        if phase == "mid-stream":
            await exchange.chunk(b"data: 1\n\n")
            assert await leaver.chunk() == b"data: 1\n\n"
        leaver.leave()
        await exchange.left()
        await at.until_counts("one", 0, 0)


@pytest.mark.parametrize("phase", ["before the first byte", "mid-body"])
async def test_from_a_plain_request(folder: Path, phase: str) -> None:
    async with house(folder, ONE) as at, at.client() as leaver:
        await leaver.request(CHAT, BODY)
        exchange = await at.upstream.request()
        if phase == "mid-body":
            await exchange.head(200, (b"Content-Type", b"application/json"), (b"Content-Length", b"100"))
            await exchange.send(b"{")
            await leaver.head()
        leaver.leave()
        await exchange.left()
        await at.until_counts("one", 0, 0)


async def test_from_a_stream_that_nobody_read(folder: Path) -> None:
    """The way is blocked then: the proxy hangs in a write, not in a read."""
    block = b"x" * 65536
    async with house(folder, ONE) as at, at.client() as leaver:
        await leaver.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.stream()

        async def pour() -> None:
            while not exchange.writer.transport.is_closing():
                await exchange.chunk(block)

        pouring = asyncio.ensure_future(pour())
        # 2 MiB came through: more than uvicorn's and aiohttp's own buffers, so writes have had to wait.
        await leaver.head()
        for _ in range(32):
            await leaver.chunk()
        leaver.leave()
        await at.until_counts("one", 0, 0)
        done, _ = await asyncio.wait([pouring], timeout=20)
        assert done, "the engine was never told"
        assert isinstance(pouring.exception(), ConnectionError | None)
        exchange.over.set()


async def test_many_at_once_leave_no_count_behind(folder: Path) -> None:
    async with house(folder, {**ONE, "max_concurrency": 4}) as at:

        async def come_and_go(n: int) -> None:
            async with at.client() as client:
                await client.request(CHAT, BODY, f"X-N: {n}")
                client.leave()

        await asyncio.gather(*(come_and_go(n) for n in range(64)))
        await at.until_counts("one", 0, 0)
        async with at.client() as client:
            await client.request(CHAT, BODY, "X-N: last")
            while (exchange := await at.upstream.request()).header(b"x-n") != [b"last"]:
                exchange.die()
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200
