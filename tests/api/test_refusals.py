"""What the daemon refuses itself: always an OpenAI error object with the field, and when to come back where that helps."""

from pathlib import Path

import pytest

from orchestrator.policy.actions import Learn
from tests.api.house import house
from tests.api.rawclient import Answer

QWEN = {"name": "qwen", "aliases": ["chat"], "source": "org/qwen"}
LLAMA = {"name": "org/llama", "source": "org/llama"}
CHAT = "/v1/chat/completions"
MIB = 1 << 20

pytestmark = pytest.mark.asyncio


NOT_JSON = (b"", b"{", b'{"model": "qwen"} {}', b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"\x1f\x8b\x08", b'{"a": 1, "model"')


@pytest.mark.parametrize(
    ("bodies", "says", "param"),
    [
        (NOT_JSON, "not JSON", None),
        ((b'["qwen"]', b'"qwen"', b"null", b"1"), "must be a JSON object", None),
        ((b'{"model": 1}', b'{"model": null}', b'{"model": ["qwen"]}', b'{"model": {}}'), "`model` must be a string", "model"),
        ((b"{}", b'{"model": ""}', b'{"Model": "qwen"}', b'{"messages": [{"model": "qwen"}]}'), "`model` is missing", "model"),
        ((b'{"model": "qwen", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",), "nested too deeply", None),
    ],
    ids=["not-json", "not-an-object", "not-a-string", "missing", "deep"],
)
async def test_a_body_that_names_no_model_is_a_400(folder: Path, bodies: tuple[bytes, ...], says: str, param: str | None) -> None:
    async with house(folder, QWEN, ready=False) as at:
        for body in bodies:
            answer = await at.post(CHAT, body)
            assert answer.status == 400, body
            assert says in answer.error["message"], body
            assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)
        assert at.upstream.untouched()


async def test_an_unknown_model_is_a_404_with_the_names_there_are(folder: Path) -> None:
    async with house(folder, QWEN, LLAMA, ready=False) as at:
        answer = await at.post(CHAT, b'{"model":"qwem"}')
        assert answer.status == 404
        assert (answer.error["type"], answer.error["param"], answer.error["code"]) == ("invalid_request_error", "model", "model_not_found")
        message = answer.error["message"]
        assert "'qwem'" in message
        assert "Did you mean 'qwen'?" in message
        assert "org/llama, qwen" in message
        assert "Did you mean" not in (await at.post(CHAT, b'{"model":"zzzz"}')).error["message"]
        assert (await at.post(CHAT, b'{"model":"QWEN"}')).status == 404  # names are exact


async def test_without_any_model_the_404_says_how_to_add_one(folder: Path) -> None:
    async with house(folder) as at:
        assert "add-model" in (await at.post(CHAT, b'{"model":"qwen"}')).error["message"]


async def test_a_body_declared_too_large_is_refused_before_it_is_sent(folder: Path) -> None:
    async with house(folder, QWEN, ready=False, max_body_bytes=MIB) as at, at.client() as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (MIB + 1))
        _is_too_large(await client.answer())


async def test_a_client_that_sends_it_all_the_same_reads_its_413_and_goes_on(folder: Path) -> None:
    async with house(folder, QWEN, max_body_bytes=MIB) as at, at.client() as client:
        await client.request(CHAT, b"x" * (8 * MIB))
        _is_too_large(await client.answer())
        await client.request(CHAT, b'{"model":"qwen"}')
        await (await at.upstream.request()).answer(200, b"{}")
        assert (await client.answer()).status == 200


async def test_a_body_of_unknown_length_is_cut_at_the_cap(folder: Path) -> None:
    async with house(folder, QWEN, ready=False, max_body_bytes=MIB) as at, at.client() as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b'{"model":"qwen"' + b" " * 65521
        for _ in range(17):
            await client.send(b"%x\r\n%s\r\n" % (len(part), part))
        _is_too_large(await client.answer())  # while the last chunk has not been sent
        assert at.upstream.untouched()


async def test_a_body_at_the_cap_passes(folder: Path) -> None:
    body = b'{"model":"qwen"' + b" " * (MIB - 16) + b"}"
    async with house(folder, QWEN, max_body_bytes=MIB) as at, at.client() as client:
        assert len(body) == MIB
        await client.request(CHAT, body)
        exchange = await at.upstream.request()
        assert exchange.body == body
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


def _is_too_large(answer: Answer) -> None:
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"
    assert f"{MIB} bytes" in answer.error["message"]
    assert "requests.max_body" in answer.error["message"]


async def test_a_full_queue_is_a_429_that_says_when_to_come_back(folder: Path) -> None:
    async with house(folder, {**QWEN, "max_concurrency": 1, "max_queue": 1}) as at, at.client() as running, at.client() as waiting:
        await running.request(CHAT, b'{"model":"qwen"}')
        exchange = await at.upstream.request()
        await waiting.request(CHAT, b'{"model":"chat"}')
        await at.until_counts("qwen", 1, 1)
        answer = await at.post(CHAT, b'{"model":"qwen"}')
        assert answer.status == 429
        assert (answer.error["type"], answer.error["code"]) == ("requests", "queue_full")
        assert "max_queue" in answer.error["message"]
        assert int(answer.header(b"retry-after") or 0) >= 1
        await exchange.answer(200, b"{}")
        assert (await running.answer()).status == 200
        following = await at.upstream.request()
        assert following.body == b'{"model":"chat"}'
        await following.answer(200, b"{}")
        assert (await waiting.answer()).status == 200


async def test_a_model_that_will_not_be_ready_in_time_is_a_503_and_is_started_all_the_same(folder: Path) -> None:
    async with house(folder, QWEN, ready=False, max_wait_s=0.2) as at:
        await at.registry.learn(
            Learn("qwen", at.registry.get("qwen").spec.footprint_key(), {"start_s": 5.0})
        )  # it has shown how long it takes
        await at.until(lambda: at.registry.get("qwen").footprint.start_s == 5.0, "that is known")
        async with at.loop.ticked:
            await at.loop.ticked.wait()
        answer = await at.post(CHAT, b'{"model":"qwen"}')
        assert answer.status == 503
        assert (answer.error["type"], answer.error["code"]) == ("server_error", "not_ready_in_time")
        assert "requests.max_wait" in answer.error["message"]
        assert int(answer.header(b"retry-after") or 0) >= 1
        await at.until_counts("qwen", 0, 0)
        await at.until_state("qwen", "ready")  # nobody waits for it, but somebody was told to come back
        async with at.client() as client:
            await client.request(CHAT, b'{"model":"qwen"}')
            await (await at.upstream.request()).answer(200, b"{}")
            assert (await client.answer()).status == 200


async def test_a_stopped_or_failed_model_is_a_503_at_once(folder: Path) -> None:
    async with house(folder, QWEN, LLAMA) as at:
        assert (await at.operate("POST", "/models/qwen/stop")).status == 202
        await at.until_state("qwen", "stopped")
        answer = await at.post(CHAT, b'{"model":"qwen"}')
        assert (answer.status, answer.error["code"]) == (503, "model_stopped")
        assert "orchestratorctl start qwen" in answer.error["message"]
        assert answer.header(b"retry-after") == b"60"

        at.engines.slow.add("org/llama")
        await at.operate("POST", "/models/org%2Fllama/stop")
        await at.until_state("org/llama", "stopped")
        await at.operate("POST", "/models/org%2Fllama/start")
        await at.until_state("org/llama", "starting")
        at.engines.die("org/llama", "its process exited with code 2", "api_server.py: error: unrecognized arguments: --x")
        await at.until_state("org/llama", "failed")
        answer = await at.post(CHAT, b'{"model":"org/llama"}')
        assert (answer.status, answer.error["code"]) == (503, "model_failed")
        assert "unrecognized arguments: --x" in answer.error["message"]


async def test_those_who_wait_are_told_when_their_model_goes(folder: Path) -> None:
    async with house(folder) as at, at.client() as waiting, at.client() as other:
        at.engines.slow.add("gone")
        assert (await at.operate("POST", "/models", b'{"name":"gone","source":"a/b"}')).status == 201
        await at.until_state("gone", "starting")
        await waiting.request(CHAT, b'{"model":"gone"}')
        await at.until_counts("gone", 0, 1)
        assert (await at.operate("DELETE", "/models/gone")).status == 202
        answer = await waiting.answer()
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "removed" in answer.error["message"]
        await other.request(CHAT, b'{"model":"gone"}')
        assert (await other.answer()).error["code"] == "model_not_found"
