"""X-Progress: sse. Who asks for it hears what it waits for, in comments that its engine's own stream goes on with."""

import json
import re
from pathlib import Path

import pytest

from orchestrator.control import traffic as module
from orchestrator.errors import ModelUnavailable
from tests.api.doorway import Doorway, doorway
from tests.api.rawclient import Answer, Client, Cut
from tests.api.upstream import Exchange

CHAT = "/v1/chat/completions"
STREAM = b'{"model":"one","stream":true}'
PROGRESS = "X-Progress: sse"

pytestmark = pytest.mark.asyncio


async def told(at: Doorway, client: Client, *headers: str) -> Answer:
    """The head of a request that waits and has heard its first comment."""
    at.door(None, phase="starting, loading weights", retry_after_s=8.2)
    await client.request(CHAT, STREAM, PROGRESS, *headers)
    head = await client.head()
    assert await client.chunk() == b": waiting for one: starting, loading weights, about 9 s\n\n"
    return head


async def admitted(at: Doorway) -> Exchange:
    at.door()
    return await at.upstream.request()


def error_in(event: bytes) -> str:
    found = re.fullmatch(rb"data: (\{.*\})\n\n", event)
    assert found is not None, event
    return str(json.loads(found[1])["error"]["code"])


async def test_comments_at_once_and_at_each_phase_then_the_engines_own_stream(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        head = await told(at, client)
        assert (head.status, head.header(b"content-type")) == (200, b"text/event-stream; charset=utf-8")
        assert (head.header(b"x-accel-buffering"), head.header(b"cache-control")) == (b"no", b"no-cache")
        at.door(None, phase="starting, capturing graphs", retry_after_s=1)
        assert await client.chunk() == b": waiting for one: starting, capturing graphs, about 1 s\n\n"
        exchange = await admitted(at)
        await exchange.stream((b"X-Mine", b"r1"))
        for event in (b'data: {"a": "\xc3', b'\xa9"}\n\n', b"data: [DONE]\n\n"):
            await exchange.chunk(event)
            assert await client.chunk() == event
        await exchange.end()
        assert await client.chunk() == b""
        await at.until_counts(0, 0)


async def test_the_connection_serves_the_next_request(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        for _ in range(2):
            await told(at, client)
            exchange = await admitted(at)
            await exchange.stream()
            await exchange.end()
            assert await client.chunk() == b""


async def test_a_silence_is_broken_again_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_S", 0.01)
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        for _ in range(3):
            assert await client.chunk() == b": waiting for one: starting, loading weights, about 9 s\n\n"


async def test_behind_others_it_is_told_that_all_places_are_taken(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as first, at.client() as client:
        at.door(max_concurrency=1, phase="ready")
        await first.request(CHAT, STREAM)
        running = await at.upstream.request()
        await client.request(CHAT, STREAM, PROGRESS)
        await client.head()
        assert await client.chunk() == b": waiting for one: all its 1 places are taken\n\n"
        await running.answer(200, b"{}")
        exchange = await at.upstream.request()
        await exchange.stream()
        await exchange.end()
        assert await client.chunk() == b""


@pytest.mark.parametrize("phase", ["a\n\ndata: [DONE]", "a\r\rdata: x", "a\u2028b", ""])
async def test_a_phase_is_one_line_whatever_is_in_it(folder: Path, phase: str) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door(None, phase=phase, retry_after_s=2)
        await client.request(CHAT, STREAM, PROGRESS)
        await client.head()
        comment = (await client.chunk()).decode()
        assert comment.startswith(": waiting for one: ")
        assert comment.endswith("about 2 s\n\n")
        assert len(comment.splitlines()) == 2


async def test_who_need_not_wait_gets_the_engines_head_and_status(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(CHAT, STREAM, PROGRESS)
        await (await at.upstream.request()).answer(400, b'{"error":{}}', (b"X-Mine", b"r1"))
        answer = await client.answer()
        assert (answer.status, answer.body, answer.header(b"x-mine")) == (400, b'{"error":{}}', b"r1")


@pytest.mark.parametrize(
    ("route", "body", "headers"),
    [
        (CHAT, STREAM, []),
        (CHAT, b'{"model":"one"}', [PROGRESS]),
        (CHAT, b'{"model":"one","stream":false}', [PROGRESS]),
        (CHAT, b'{"model":"one","stream":"true"}', [PROGRESS]),
        ("/v1/embeddings", STREAM, [PROGRESS]),
        ("/tokenize", STREAM, [PROGRESS]),
    ],
    ids=["no header", "no stream", "stream off", "stream is a string", "embeddings", "tokenize"],
)
async def test_without_opting_in_nothing_is_sent_before_the_engine_answers(
    folder: Path, route: str, body: bytes, headers: list[str]
) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door(None, phase="starting")
        await client.request(route, body, *headers)
        await at.until_counts(0, 1)
        at.door(None, phase="starting, loading weights")
        exchange = await admitted(at)
        await exchange.answer(418, b"{}")
        assert (await client.answer()).status == 418  # the first that came, or the status would be 200


async def test_refused_at_the_door_it_has_its_status(folder: Path) -> None:
    async with doorway(folder) as at:
        for fields, status in (({"max_queue": 0}, 429), ({"retry_after_s": 61}, 503), ({"error": ModelUnavailable("down")}, 503)):
            at.door(None, **fields)
            async with at.client() as client:
                await client.request(CHAT, STREAM, PROGRESS)
                assert (await client.answer()).status == status


async def test_refused_later_it_gets_an_error_event_and_an_end(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        at.door(None, error=ModelUnavailable("it has failed", code="model_failed"))
        assert error_in(await client.chunk()) == "model_failed"
        assert await client.chunk() == b""  # whole, and not [DONE]


async def test_a_wait_that_ends_in_vain_is_an_error_event(folder: Path) -> None:
    async with doorway(folder, max_wait_s=0.05) as at, at.client() as client:
        at.door(None, retry_after_s=0)
        await client.request(CHAT, STREAM, PROGRESS)
        assert (await client.head()).status == 200
        await client.chunk()
        assert error_in(await client.chunk()) == "timeout"
        assert await client.chunk() == b""
        await at.until_counts(0, 0)


@pytest.mark.parametrize(
    ("status", "body", "event"),
    [
        (400, b'{"error":{"message":"too long","code":400}}', b'data: {"error":{"message":"too long","code":400}}\n\n'),
        (400, b'{\n "error": {"code": 1}\r\n}', b'data: {\ndata:  "error": {"code": 1}\ndata: }\n\n'),
        (200, b'{"answer":1}', b'data: {"answer":1}\n\n'),
    ],
)
async def test_an_answer_that_is_no_stream_becomes_an_event(folder: Path, status: int, body: bytes, event: bytes) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        await (await admitted(at)).answer(status, body)
        assert await client.chunk() == event
        assert await client.chunk() == b""
        await at.until_counts(0, 0)


@pytest.mark.parametrize("body", [b"", b"Internal Server Error", b'{"detail":"Not Found"}', b"[]", b"\xff", b"null"])
async def test_a_failure_that_says_nothing_a_client_understands_becomes_an_error(folder: Path, body: bytes) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        await (await admitted(at)).answer(500, body)
        event = await client.chunk()
        assert error_in(event) == "engine_error"
        assert b"status 500" in event
        assert await client.chunk() == b""


async def test_an_engine_that_dies_before_its_answer_is_an_error_event_and_an_end(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        (await admitted(at)).die()
        assert error_in(await client.chunk()) == "engine_error"
        assert await client.chunk() == b""
        await at.until_counts(0, 0)


async def test_an_engine_that_dies_in_its_answer_never_looks_like_a_short_success(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client)
        exchange = await admitted(at)
        await exchange.stream()
        await exchange.chunk(b"data: 1\n\n")
        assert await client.chunk() == b"data: 1\n\n"
        exchange.die()
        assert error_in(await client.chunk()) == "engine_error"
        with pytest.raises(Cut):
            await client.chunk()


async def test_the_engine_may_not_compress_what_has_begun_as_text(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        await told(at, client, "Accept-Encoding: gzip")
        exchange = await admitted(at)
        assert exchange.header(b"accept-encoding") == []
        assert exchange.body == STREAM
        exchange.die()


async def test_a_client_that_leaves_while_it_is_told_frees_its_place(folder: Path) -> None:
    async with doorway(folder) as at:
        async with at.client() as client:
            await told(at, client)
            client.leave()
            await at.until_counts(0, 0)
        assert at.upstream.untouched()
