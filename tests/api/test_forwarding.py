"""What goes through the proxy goes through unchanged: bodies, statuses, chunks as they come. What must not, does not."""

import asyncio
import json
from pathlib import Path

import pytest

from orchestrator.api.routes import TABLE, Model
from tests.api.house import house
from tests.api.rawclient import Cut

QWEN = {"name": "org/qwen", "aliases": ["q"], "source": "org/qwen"}
CHAT = "/v1/chat/completions"
BODY = b'{"model":"org/qwen"}'
ROUTES = [route.path for route in TABLE if route.model is Model.BODY]

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("way")]


async def test_bodies_go_both_ways_unchanged(folder: Path) -> None:
    sent = '{ "n": 123456789012345678901234567890.50, "a": 1, "a": 2,\n "model":"q", "t": "žluť 🐎 \\u00e9", "model" : "org/qwen"}'.encode()
    back = b'{"z": 1, "z": 2, "big": 1e400, "text": "\xf0\x9f\x90\x8e \xff"}\r\n\x00'
    async with house(folder, QWEN) as at, at.client() as client:
        for route in ROUTES:
            await client.request(route, sent)
            exchange = await at.upstream.request()
            assert (exchange.target.decode(), exchange.body) == (route, sent)
            await exchange.answer(200, back)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, back)


async def test_the_engines_status_and_body_pass_through(folder: Path) -> None:
    back = b'{"error":{"message":"This model\'s maximum context length is 8","type":"BadRequestError","param":null,"code":400}}'
    async with house(folder, QWEN) as at, at.client() as client:
        for status in (200, 201, 302, 400, 401, 404, 422, 429, 500, 503):
            await client.request(CHAT, BODY)
            await (await at.upstream.request()).answer(status, back, (b"Retry-After", b"7"), (b"Location", b"/sleep"))
            answer = await client.answer()
            assert (answer.status, answer.body) == (status, back)
            assert (answer.header(b"retry-after"), answer.header(b"location")) == (b"7", b"/sleep")


async def test_headers_of_this_hop_and_secrets_stay_here(folder: Path) -> None:
    kept = ["X-Title: žluť", "X-Two: 1", "X-Two: 2", "x-stainless-os: Linux"]
    keys = ("Authorization", "X-Api-Key", "Api-Key", "Cookie", "Proxy-Authorization", "Sec-WebSocket-Protocol")
    gone = [f"{name}: openai-insecure-api-key.sk-secret" for name in keys]
    hop = ["Connection: keep-alive, X-Hop", "X-Hop: sk-secret", "Keep-Alive: 5", "TE: trailers", "Trailer: x"]
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY, *kept, *gone, *hop)
        exchange = await at.upstream.request()
        assert [exchange.header(name) for name in (b"x-title", b"x-two", b"x-stainless-os")] == [
            ["žluť".encode()], [b"1", b"2"], [b"Linux"],
        ]  # fmt: skip
        assert not [pair for pair in exchange.headers if b"sk-secret" in pair[1]]
        assert not {key.lower() for key, _ in exchange.headers} & {b"keep-alive", b"te", b"trailer", b"x-hop", b"cookie"}
        assert exchange.header(b"content-length") == [b"%d" % len(BODY)]
        await exchange.answer(200, b"{}", (b"Server", b"uvicorn"), (b"Date", b"long ago"), (b"Keep-Alive", b"timeout=5"), (b"X-Mine", b"1"))
        answer = await client.answer()
        assert answer.header(b"x-mine") == b"1"
        assert (answer.header(b"server"), answer.header(b"keep-alive")) == (None, None)
        assert answer.header(b"date") != b"long ago"


async def test_nothing_is_added_that_the_client_did_not_say(folder: Path) -> None:
    """An Accept-Encoding of ours would let an engine answer in gzip to a client that cannot read it."""
    async with house(folder, QWEN) as at, at.client() as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
        exchange = await at.upstream.request()
        assert {key.lower() for key, _ in exchange.headers} == {b"host", b"content-length", b"x-request-id", b"traceparent"}
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_compressed_answers_stay_compressed(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY, "Accept-Encoding: gzip")
        exchange = await at.upstream.request()
        assert exchange.header(b"accept-encoding") == [b"gzip"]
        await exchange.answer(200, b"\x1f\x8b not really", (b"Content-Encoding", b"gzip"))
        answer = await client.answer()
        assert (answer.header(b"content-encoding"), answer.body) == (b"gzip", b"\x1f\x8b not really")


async def test_the_query_string_is_kept_byte_for_byte(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT + "?a=%20b+c&d=%7E%2C%2B&a=2&e=", BODY)
        exchange = await at.upstream.request()
        assert exchange.target == CHAT.encode() + b"?a=%20b+c&d=%7E%2C%2B&a=2&e="
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_a_chunk_is_seen_before_the_next_one_is_sent(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.stream((b"X-Mine", b"r1"))
        head = await client.head()  # before there is any chunk
        assert (head.status, head.header(b"content-type")) == (200, b"text/event-stream; charset=utf-8")
        assert head.header(b"x-mine") == b"r1"
        assert head.header(b"x-accel-buffering") == b"no"
        for event in (b'data: {"a": "\xc3', b'\xa9"}\n\n', b": ping\n\n", b"data: [DONE]\n\n"):  # a character may be cut in two
            await exchange.chunk(event)
            assert await client.chunk() == event
        await exchange.end()
        assert await client.chunk() == b""


async def test_a_connection_serves_one_request_after_the_other_on_both_sides(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        for n in range(3):
            await client.request(CHAT, b'{"model":"q","n":%d}' % n)
            exchange = await at.upstream.request()
            await exchange.answer(200, exchange.body)
            assert (await client.answer()).json["n"] == n
        assert at.upstream.connections == 1
        await at.until_counts("org/qwen", 0, 0)


async def test_a_body_in_chunks_arrives_whole(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.head()).status == 100
        for part in (BODY[:5], BODY[5:]):
            await client.send(b"%x\r\n%s\r\n" % (len(part), part))
        await client.send(b"0\r\n\r\n")
        exchange = await at.upstream.request()
        assert exchange.body == BODY
        assert (exchange.header(b"transfer-encoding"), exchange.header(b"expect")) == ([], [])
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_a_slow_reader_holds_the_engine_back_and_loses_nothing(folder: Path) -> None:
    """Else a client that does not read would fill the daemon's memory with whatever its engine makes."""
    block, blocks = b"0123456789abcdef" * 4096, 1024  # 64 MiB; sockets between the two hold a few of them

    async def produce() -> int:
        """Blocks sent until the way was blocked for half a second, or all."""
        exchange.writer.transport.set_write_buffer_limits(high=0)
        for sent in range(blocks):
            exchange.writer.write(b"%x\r\n%s\r\n" % (len(block), block))
            draining = asyncio.ensure_future(exchange.writer.drain())
            done, _ = await asyncio.wait({draining}, timeout=0.5)
            if not done:
                if not blocked.done():
                    blocked.set_result(sent)
                await draining
        return blocks

    async def finish() -> None:
        await producing
        await exchange.end()

    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)  # so that the connection is a kept one, before and after
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200
        blocked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.stream()
        producing = asyncio.ensure_future(produce())
        await asyncio.wait({producing, blocked}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert blocked.done(), "all 64 MiB were taken although nobody read them"
        assert blocked.result() < blocks / 4, "more than 16 MiB lie between the engine and a client that does not read"
        assert (await client.head()).status == 200
        finishing = asyncio.ensure_future(finish())
        assert sum([len(chunk) async for chunk in client.chunks()]) == blocks * len(block)
        await finishing
        await client.request(CHAT, BODY)
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200
        assert at.upstream.connections == 1


async def test_an_engines_last_words_that_fill_the_way_leave_a_connection_that_still_reads(folder: Path) -> None:
    last = b"x" * (8 << 20)  # more than the sockets between the two hold
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.stream()
        exchange.writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))
        assert (await client.head()).status == 200
        assert sum([len(chunk) async for chunk in client.chunks()]) == len(last)
        exchange.over.set()
        await client.request(CHAT, BODY)
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200
        assert at.upstream.connections == 1


async def test_a_kept_connection_that_ends_in_the_moment_of_its_use_is_tried_once_more(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200
        await client.request(CHAT, BODY)
        (await at.upstream.request()).die()  # nothing had come back
        again = await at.upstream.request()
        assert (again.body, at.upstream.connections) == (BODY, 2)
        again.die()  # a new connection: once is enough
        assert (await client.answer()).status == 502
        await at.until_counts("org/qwen", 0, 0)


async def test_a_kept_connection_that_ends_in_mid_answer_is_not_tried_again(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-")
        exchange.die()
        assert (await client.answer()).status == 502
        assert at.upstream.connections == 1


async def test_an_engine_that_dies_before_the_first_byte_is_a_502(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        (await at.upstream.request()).die()
        answer = await client.answer()
        assert answer.status == 502
        assert (answer.error["type"], answer.error["code"]) == ("server_error", "engine_error")
        assert "org/qwen" in answer.error["message"]
        assert answer.header(b"retry-after") == b"5"
        await at.until_counts("org/qwen", 0, 0)


async def test_an_engine_that_is_not_there_is_a_502(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        at.upstream.path.unlink()
        answer = await at.post(CHAT, BODY)
        assert (answer.status, answer.error["code"]) == (502, "engine_error")
        await at.until_counts("org/qwen", 0, 0)


async def test_an_engine_that_dies_mid_stream_leaves_an_error_event_and_a_broken_end(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.stream()
        await exchange.chunk(b"data: 1\n\n")
        assert (await client.head()).status == 200
        assert await client.chunk() == b"data: 1\n\n"
        exchange.die()
        event = await client.chunk()
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        assert json.loads(event[6:])["error"]["code"] == "engine_error"
        with pytest.raises(Cut):
            await client.chunk()
        await at.until_counts("org/qwen", 0, 0)


@pytest.mark.parametrize("framing", ["declared", "chunked"])
async def test_an_engine_that_dies_in_a_plain_answer_never_looks_like_a_short_success(folder: Path, framing: str) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        length = (b"Content-Length", b"100") if framing == "declared" else (b"Transfer-Encoding", b"chunked")
        await exchange.head(200, (b"Content-Type", b"application/json"), length)
        await exchange.send(b'{"half":' if framing == "declared" else b'8\r\n{"half":\r\n')
        exchange.die()
        with pytest.raises(Cut):
            await client.answer()
        await at.until_counts("org/qwen", 0, 0)


async def test_an_engine_that_speaks_no_http_is_a_502(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.send(b"\x00\x01\x02 nonsense\r\n\r\n")
        assert (await client.answer()).error["code"] == "engine_error"


@pytest.mark.parametrize("at_once", [True, False])
async def test_an_engine_that_says_more_than_its_answer_is_not_believed_again(folder: Path, at_once: bool) -> None:
    """What it says next would be taken for the next request's answer, and be another person's."""
    whole, more = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b'HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n{"n": 99}'
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.send(whole + more if at_once else whole)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"{}")
        if not at_once:
            await exchange.send(more)
        await exchange.left()
        await client.request(CHAT, BODY)
        await (await at.upstream.request()).answer(200, b'{"n":1}')
        assert (await client.answer()).json == {"n": 1}


async def test_interim_answers_are_passed_over(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(CHAT, BODY)
        exchange = await at.upstream.request()
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        await exchange.answer(200, b"{}")
        answer = await client.answer()
        assert (answer.status, answer.header(b"link")) == (200, None)


async def test_a_client_that_offers_http2_is_answered_in_http1(folder: Path) -> None:
    """Java's does, in its first request."""
    offer = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"]
    async with house(folder, QWEN) as at, at.client() as client:
        for headers, size in ((offer, 1 << 20), ([], 5), (offer, 5)):
            head = [f"POST {CHAT} HTTP/1.1", "Host: h", f"Content-Length: {len(BODY)}", *headers, "", ""]
            raw = "\r\n".join(head).encode() + BODY
            for start in range(0, len(raw), size):
                await client.send(raw[start : start + size])
                await asyncio.sleep(0)
            exchange = await at.upstream.request()
            assert exchange.body == BODY
            assert not exchange.header(b"upgrade") + exchange.header(b"http2-settings")
            assert at.upstream.connections == 1
            await exchange.answer(200, b"{}")
            assert (await client.answer()).status == 200
