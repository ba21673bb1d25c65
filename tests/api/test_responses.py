"""A response is asked for by its id alone: at the engine that made it, and at no other."""

import json
from pathlib import Path

import pytest

from orchestrator.api import responses
from orchestrator.api.responses import Made, Naming, Responses
from orchestrator.errors import RouteNotFound
from tests.api.doorway import Doorway, doorway
from tests.api.house import house

PATH = "/v1/responses"
BODY = b'{"model":"one","input":"x"}'
WHOLE = b'{"id":"resp_0a","object":"response","output":[{"id":"msg_9"}],"status":"completed"}'
EVENT = b'event: response.created\ndata: {"response":{"id":"resp_0a","output":[]},"sequence_number":0,"type":"response.created"}\n\n'

pytestmark = pytest.mark.asyncio


async def make(at: Doorway, answer: bytes = WHOLE) -> None:
    async with at.client() as client:
        await client.request(PATH, BODY)
        await (await at.upstream.request()).answer(200, answer)
        assert (await client.answer()).body == answer


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_that_was_made_here_is_found_and_cancelled(folder: Path, streamed: bool) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(PATH, BODY)
        exchange = await at.upstream.request()
        if streamed:
            await exchange.stream()
            for part in (EVENT[:40], EVENT[40:60], EVENT[60:]):  # wherever it is cut
                await exchange.chunk(part)
            await exchange.end()
        else:
            await exchange.answer(200, WHOLE)
        await client.answer()
        for method, target in (
            ("GET", "/v1/responses/resp_0a"),
            ("GET", "/v1/responses/resp_0a?stream=true"),
            ("POST", "/v1/responses/resp_0a/cancel"),
        ):
            await client.request(target, b"", method=method)
            exchange = await at.upstream.request()
            assert exchange.target == target.encode()
            await exchange.answer(200, WHOLE)
            assert (await client.answer()).body == WHOLE
        await at.until_counts(0, 0)


async def test_one_that_nobody_made_here_is_a_404_and_asks_no_engine(folder: Path) -> None:
    async with house(folder, {"name": "one", "source": "org/one"}) as at:
        for method, target in (
            ("GET", "/v1/responses/resp_1"),
            ("POST", "/v1/responses/resp_1/cancel"),
            ("GET", "/v1/responses/resp_1?stream=true"),
        ):
            answer = await at.post(target, b"", method=method)
            assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "response_not_found", "response_id")
        for method in ("DELETE", "POST", "PUT"):
            answer = await at.post("/v1/responses/resp_1", b"", method=method)
            assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
        assert at.upstream.untouched()


async def test_with_its_engine_it_is_gone(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await make(at)
        at.upstreams.tidy(())
        at.upstream.path.unlink()
        await client.request("/v1/responses/resp_0a", method="GET")
        assert (await client.answer()).error["code"] == "response_not_found"


async def test_a_next_one_without_a_model_goes_where_the_previous_one_was_made(folder: Path) -> None:
    body = b'{"previous_response_id":"resp_0a","input":"y"}'
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(PATH, body)
        assert (await client.answer()).error["code"] == "response_not_found"
        await make(at)
        await client.request(PATH, body)
        exchange = await at.upstream.request()
        assert exchange.body == body
        assert at.traffic.seen()["one"].in_flight == 1
        await exchange.answer(200, b'{"id":"resp_0b"}')
        await client.answer()
        at.door("another launch")  # of the same model: it does not know what the first one kept
        await client.request(PATH, body)
        assert (await client.answer()).error["code"] == "response_not_found"
        await at.until_counts(0, 0)


@pytest.mark.parametrize("given", [b'{"input":"y"}', b'{"previous_response_id":1}', b'{"previous_response_id":""}', b'{"model":""}'])
async def test_without_either_it_is_a_400(folder: Path, given: bytes) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(PATH, given)
        assert (await client.answer()).error["code"] == "missing_required_parameter"


async def test_one_in_the_background_holds_its_place_until_it_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its engine would be put to sleep at its work, as idle."""
    monkeypatch.setattr(responses, "POLL_S", 0.01)
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(PATH, b'{"model":"one","input":"x","background":true}')
        await (await at.upstream.request()).answer(200, b'{"id":"resp_0a","status":"queued"}')
        assert (await client.answer()).status == 200
        client.leave()
        for status in ("queued", "in_progress", "in_progress"):
            exchange = await at.upstream.request()
            assert exchange.target == b"/v1/responses/resp_0a"
            assert at.traffic.seen()["one"].in_flight == 1
            await exchange.answer(200, json.dumps({"id": "resp_0a", "status": status}).encode())
        await (await at.upstream.request()).answer(200, b'{"id":"resp_0a","status":"completed"}')
        await at.until_counts(0, 0)


async def test_a_connection_goes_on_while_one_of_its_responses_is_made_in_the_background(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "POLL_S", 0.01)
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(PATH, b'{"model":"one","input":"x","background":true}')
        await (await at.upstream.request()).answer(200, b'{"id":"resp_0a","status":"queued"}')
        await client.answer()
        polled = await at.upstream.request()
        await client.request(PATH, b'{"model":"one","input":"y"}')
        second = await at.upstream.request()
        await polled.answer(200, b'{"status":"completed"}')
        await at.until_counts(1, 0)
        client.leave()  # the second one's leaving is heard, whatever the first one did meanwhile
        await second.left()
        await at.until_counts(0, 0)


async def test_the_oldest_are_forgotten() -> None:
    known = Responses(most=3)
    for n in (1, 2, 3, 1, 4):
        known.remember(f"resp_{n}", Made("m", "l"))
    assert known.of("resp_1", "") == Made("m", "l")
    with pytest.raises(RouteNotFound):
        known.of("resp_2", "")


async def test_each_key_finds_its_own() -> None:
    known = Responses()
    known.remember("resp_1", Made("m", "l", "alice"))
    assert known.of("resp_1", "alice").model == "m"
    for other in ("bob", ""):
        with pytest.raises(RouteNotFound):
            known.of("resp_1", other)


async def test_what_names_no_response_is_read_to_4_kib_and_no_further() -> None:
    naming = Naming(Responses(), Made("m", "l"), None)
    for _ in range(100):
        assert naming.part(b"x" * 1000) == b"x" * 1000
    naming.part(b'"id":"resp_1"')
    assert naming.id == ""
