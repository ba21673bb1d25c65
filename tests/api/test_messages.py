"""What is refused on Anthropic's routes is told in Anthropic's words; the engine's own words pass as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.doorway import doorway
from tests.api.house import house
from tests.api.rawclient import Answer, Cut

QWEN = {"name": "qwen", "source": "org/qwen", "max_concurrency": 1, "max_queue": 1}
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("way")]


def error(answer: Answer) -> tuple[int, str, str]:
    """Status, type, message, of an answer that has exactly the shape."""
    assert answer.header(b"content-type") == b"application/json"
    found: dict[str, Any] = answer.json
    assert set(found) == {"type", "error", "request_id"}
    assert set(found["error"]) == {"type", "message"}
    assert found["type"] == "error"
    assert found["request_id"].encode() == answer.header(b"x-request-id") == answer.header(b"request-id")
    return answer.status, found["error"]["type"], found["error"]["message"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_requests_that_are_wrong(folder: Path, path: str) -> None:
    async with house(folder, QWEN, max_body_bytes=4096) as at:
        assert error(await at.post(path, b"{"))[:2] == (400, "invalid_request_error")
        assert error(await at.post(path, b"{}"))[:2] == (400, "invalid_request_error")
        assert error(await at.post(path, b'{"model":"qwen"}', "X-Priority: 99"))[:2] == (400, "invalid_request_error")
        assert error(await at.post(path, b'{"model":"x"}'))[:2] == (404, "not_found_error")
        assert error(await at.post(path, b" " * 4097))[:2] == (413, "request_too_large")
        assert error(await at.get(path))[:2] == (405, "invalid_request_error")
        assert (await at.post(path + "/", b"{}")).error["code"] == "route_not_found"


async def test_a_full_queue_and_a_model_that_is_held(folder: Path) -> None:
    body = b'{"model":"qwen"}'
    async with house(folder, QWEN) as at, at.client() as running, at.client() as waiting:
        await running.request(MESSAGES, body)
        exchange = await at.upstream.request()
        await waiting.request(MESSAGES, body)
        await at.until_counts("qwen", 1, 1)
        refused = await at.post(MESSAGES, body)
        assert error(refused)[:2] == (429, "rate_limit_error")
        assert int(refused.header(b"retry-after") or 0) >= 1
        await exchange.answer(200, b"{}")
        answer = await running.answer()
        assert answer.header(b"request-id") == answer.header(b"x-request-id")
        await (await at.upstream.request()).answer(200, b"{}")
        await waiting.answer()
        await at.operate("POST", "/models/qwen/stop")
        await at.until_state("qwen", "stopped")
        assert error(await at.post(MESSAGES, body))[:2] == (503, "overloaded_error")


async def test_an_engine_that_dies_before_the_first_byte(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(MESSAGES, b'{"model":"qwen"}')
        (await at.upstream.request()).die()
        assert error(await client.answer())[:2] == (502, "api_error")


async def test_an_engine_that_dies_mid_stream(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(MESSAGES, b'{"model":"qwen","stream":true}', "X-Request-Id: r1")
        exchange = await at.upstream.request()
        await exchange.stream()
        await exchange.chunk(b"event: ping\ndata: {}\n\n")
        assert (await client.head()).header(b"request-id") == b"r1"
        assert await client.chunk() == b"event: ping\ndata: {}\n\n"
        exchange.die()
        name, data, *rest = (await client.chunk()).split(b"\n")
        assert (name, rest) == (b"event: error", [b"", b""])
        found = json.loads(data.removeprefix(b"data: "))
        assert (found["type"], found["error"]["type"], found["request_id"]) == ("error", "api_error", "r1")
        with pytest.raises(Cut):
            await client.chunk()


async def test_who_is_told_what_it_waits_for_is_told_of_the_error_in_an_event(folder: Path) -> None:
    async with doorway(folder, max_wait_s=0.2) as at, at.client() as client:
        at.door(None, phase="starting", timed=False)
        await client.request(MESSAGES, b'{"model":"one","stream":true}', "X-Progress: sse")
        await client.head()
        parts = [part async for part in client.chunks()]
        assert parts[0].startswith(b": waiting for one")
        name, data = parts[-1].split(b"\n")[:2]
        assert name == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["error"]["type"] == "overloaded_error"


async def test_the_engines_own_errors_pass_as_they_are(folder: Path) -> None:
    back = b'{"type":"error","error":{"type":"BadRequestError","message":"no"}}'
    async with house(folder, QWEN) as at, at.client() as client:
        await client.request(MESSAGES, b'{"model":"qwen"}')
        await (await at.upstream.request()).answer(400, back)
        assert (await client.answer()).body == back
