"""Keys on real sockets: what operators are told, who is served, what a key may, and that all that was used is counted."""

import json
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.asking import read
from orchestrator.api.routes import TABLE
from orchestrator.control.keys import Keys
from orchestrator.policy.key import KeySpec, StoredKey
from tests.api.house import House, house
from tests.api.rawclient import Answer

pytestmark = pytest.mark.asyncio
ONE = {"name": "one", "source": "a/b", "aliases": ["uno"]}
TWO = {"name": "two", "source": "a/b"}
CHAT = "/v1/chat/completions"


async def create(at: House, name: str = "ci", **fields: Any) -> Answer:
    return await at.operate("POST", "/keys", json.dumps({"name": name, **fields}).encode())


async def key(at: House, name: str = "ci", **fields: Any) -> str:
    """The header that bears a new key."""
    answer = await create(at, name, **fields)
    assert answer.status == 201, answer.body
    return f"Authorization: Bearer {answer.json['key']}"


async def listed(at: House) -> dict[str, Any]:
    return {found["name"]: found for found in (await at.operate("GET", "/keys")).json["keys"]}


async def served(at: House, *headers: str, model: str = "one", usage: tuple[int, int] = (3, 4)) -> None:
    """A request that its engine answers."""
    async with at.client() as client:
        await client.request(CHAT, json.dumps({"model": model}).encode(), *headers)
        exchange = await at.upstream.request()
        body = {"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
        await exchange.answer(200, json.dumps(body).encode())
        assert (await client.answer()).status == 200


async def refused(at: House, *headers: str, model: str = "one") -> Answer:
    answer = await at.post(CHAT, json.dumps({"model": model}).encode(), *headers)
    assert answer.status >= 400
    return answer


# ---- for operators ------------------------------------------------------------------------------------------------------------


async def test_a_key_is_shown_once(folder: Path) -> None:
    async with house(folder, ONE) as at:
        before = time.time()
        made = (await create(at, models=["uno", "one"], rpm=5, weight=0.5, priority=-2, expires="1h")).json
        secret = made.pop("key")
        assert secret.startswith(made["prefix"])
        assert before + 3600 <= made.pop("expires_at") <= time.time() + 3600
        assert before <= made.pop("created_at") <= time.time()
        nothing = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        assert made == {
            "name": "ci", "models": ["one"], "rpm": 5, "tpm": None, "concurrency": None, "monthly_tokens": None, "priority": -2,
            "weight": 0.5, "prefix": secret[:12], "state": "active", "running": 0, "last_used_at": None, "revoked_at": None,
            "today": nothing, "month": nothing,
        }  # fmt: skip
        everything = (await at.operate("GET", "/keys")).body + (await at.operate("GET", "/keys/usage")).body
        assert secret.encode() not in everything
        assert (await listed(at))["ci"]["models"] == ["one"]


async def test_every_field_that_is_wrong_is_named_at_once(folder: Path) -> None:
    async with house(folder, ONE) as at:
        answer = await create(at, "no spaces", rpm=0, weight="much", expires="soon", priority=9, rps=1)
        assert (answer.status, answer.error["code"]) == (422, "invalid_spec")
        wrong = {error["field"]: error["message"] for error in answer.error["errors"]}
        assert set(wrong) == {"name", "rpm", "weight", "expires", "priority", "rps"}
        assert wrong["rpm"] == "0: input should be greater than or equal to 1"
        assert "30d" in wrong["expires"]
        assert "unknown field; a key has: name, models" in wrong["rps"]
        answer = await create(at, models=["onne", "two"])
        assert [error["field"] for error in answer.error["errors"]] == ["models", "models"]
        assert "'onne' does not exist. Did you mean 'one'?" in answer.error["errors"][0]["message"]
        for body in (b"[]", b"{", b"\xff"):
            assert (await at.operate("POST", "/keys", body)).status == 400
        assert (await at.operate("POST", "/keys", b"{}")).error["errors"] == [
            {"field": "name", "message": "is missing: give the key a name"}
        ]
        assert await listed(at) == {}
        assert (await at.get("/v1/models")).status == 200  # nothing was made: nobody needs one


async def test_names_that_are_taken_or_not_there(folder: Path) -> None:
    async with house(folder) as at:
        assert (await create(at)).status == 201
        answer = await create(at)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (409, "conflict", "name")
        for method, target in (("DELETE", "/keys/cii"), ("GET", "/keys/usage?name=cii")):
            answer = await at.operate(method, target)
            assert (answer.status, answer.error["code"]) == (404, "key_not_found")
            assert "Did you mean 'ci'?" in answer.error["message"]
        answer = await at.operate("GET", "/keys/usage?since=yesterday")
        assert (answer.status, answer.error["param"]) == (400, "since")
        assert (await create(at, "usage")).status == 201
        assert (await at.operate("DELETE", "/keys/usage")).json["state"] == "revoked"


async def test_over_tcp_keys_are_made_with_the_admin_key_alone(folder: Path) -> None:
    async with house(folder, key="root") as at:
        users = await key(at)
        body = b'{"name": "more"}'
        for headers in ((), (users,)):
            assert (await at.post("/api/v1/keys", body, *headers)).status == 401
        assert (await at.post("/api/v1/keys", body, "Authorization: Bearer root")).status == 201


# ---- who is served ------------------------------------------------------------------------------------------------------------


async def test_from_the_first_key_on_and_for_ever_a_key_is_needed(folder: Path) -> None:
    async with house(folder, ONE) as at:
        await served(at)
        good = await key(at)
        await served(at, good)
        await served(at, good.replace("Authorization: Bearer", "x-api-key:"))
        wrong = ((), (good + "x",), ("Authorization: Basic eDp4",), ("x-api-key: sk-orch-no",))
        answers = [await refused(at, *headers) for headers in wrong]
        assert (await at.operate("DELETE", "/keys/ci")).json["state"] == "revoked"
        answers += [await refused(at, good), await refused(at), await at.get("/v1/models"), await at.get("/v1/models/one", good)]
        for answer in answers:
            assert (answer.status, answer.error["code"], answer.header(b"www-authenticate")) == (401, "invalid_api_key", b"Bearer")
        assert len({answer.error["message"] for answer in answers}) == 1
        assert (await at.get("/health")).status == 200
        await served(at, await key(at))


async def test_a_refusal_does_not_wait_for_the_body(folder: Path) -> None:
    async with house(folder, ONE) as at:
        await key(at)
        async with at.client() as client:
            await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n{")
            assert (await client.answer()).status == 401


# ---- what it may --------------------------------------------------------------------------------------------------------------


async def test_a_key_sees_and_uses_its_models_alone(folder: Path) -> None:
    async with house(folder, ONE, TWO) as at:
        only, free = await key(at, models=["uno"]), await key(at, "free")
        for header, names in ((only, ["one"]), (free, ["one", "two"])):
            assert [model["id"] for model in (await at.get("/v1/models", header)).json["data"]] == names
        await served(at, only, model="uno")
        assert (await at.get("/v1/models/uno", only)).json["id"] == "one"
        answers = [await refused(at, only, model=name) for name in ("two", "none")]
        answers.append(await at.get("/v1/models/two", only))
        for answer in answers:
            assert (answer.status, answer.error["code"], answer.error["param"]) == (403, "model_not_allowed", "model")
            assert answer.error["type"] == "permission_error"
        known = await refused(at, free, model="none")
        assert (known.status, known.error["code"]) == (404, "model_not_found")
        assert all("two" not in answer.error["message"].replace("'two'", "") for answer in answers)


async def test_a_request_over_a_limit_is_told_when_to_come_back(folder: Path) -> None:
    keys = Keys(clock=lambda: now[0])
    now = [1000.0]
    async with house(folder, ONE, keys=keys) as at:
        fast, much, spent = await key(at, rpm=2), await key(at, "much", tpm=60), await key(at, "spent", monthly_tokens=5)
        for header in (fast, fast, much, spent):
            await served(at, header, usage=(40, 40))
        for header, kind, seconds in ((fast, "requests", b"30"), (much, "tokens", b"21")):
            answer = await refused(at, header)
            assert (answer.status, answer.error["type"], answer.error["code"]) == (429, kind, "rate_limit_exceeded")
            assert answer.header(b"retry-after") == seconds
        now[0] += 20
        await refused(at, much)
        now[0] += 10
        await served(at, fast)
        await served(at, much)
        answer = await refused(at, spent)
        assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")
        assert 0 < int(answer.header(b"retry-after") or 0) <= 31 * 86400


async def test_concurrency_counts_those_that_wait_and_comes_back_however_they_end(folder: Path) -> None:
    async with house(folder, {**ONE, "max_concurrency": 1}) as at:
        header = await key(at, concurrency=2)
        body = json.dumps({"model": "one"}).encode()
        async with at.client() as runs, at.client() as waits:
            await runs.request(CHAT, body, header)
            exchange = await at.upstream.request()
            await waits.request(CHAT, body, header)
            await at.until_counts("one", 1, 1)
            answer = await refused(at, header)
            assert (answer.status, answer.header(b"retry-after")) == (429, b"1")
            assert (await listed(at))["ci"]["running"] == 2
            waits.leave()
            await at.until_counts("one", 1, 0)
            exchange.die()
            assert (await runs.answer()).status == 502
        assert (await listed(at))["ci"]["running"] == 0
        await served(at, header)


async def test_the_header_for_priority_may_only_lower_it_and_the_key_is_the_client() -> None:
    keys = Keys()
    keys.admit(StoredKey(KeySpec(name="ci", priority=2, weight=3.0), sha256(b"sk-orch-x").digest(), "sk-orch-x", 0.0), 0)
    caller = keys.caller({b"x-api-key": b"sk-orch-x"}, "")
    for asked, priority in ((None, 2), (b"8", 2), (b"-1", -1)):
        headers = {} if asked is None else {b"x-priority": asked}
        asker = read(TABLE[0], headers, b'{"model": "one"}', caller).asker
        assert (asker.client, asker.priority, asker.weight) == ("ci", priority, 3.0)
    anonymous = read(TABLE[0], {b"x-priority": b"8"}, b'{"model": "one"}', keys.caller({}, "10.0.0.1")).asker
    assert (anonymous.client, anonymous.priority, anonymous.weight) == ("10.0.0.1", 8, 1.0)


# ---- what it used -------------------------------------------------------------------------------------------------------------


async def test_a_stream_is_counted_and_shows_no_more_than_was_asked_for(folder: Path) -> None:
    word = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
    told = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
    async with house(folder, ONE) as at:
        header = await key(at)
        for asks in (False, True):
            options = {"stream_options": {"include_usage": True}} if asks else {}
            async with at.client() as client:
                await client.request(CHAT, json.dumps({"model": "one", "stream": True, **options}).encode(), header)
                exchange = await at.upstream.request()
                assert json.loads(exchange.body)["stream_options"] == {"include_usage": True}
                assert not exchange.header(b"authorization")
                await exchange.stream()
                for event in (word, told, b"data: [DONE]\n\n"):
                    await exchange.chunk(event)
                await exchange.end()
                body = (await client.answer()).body
                assert (told in body, word in body, body.endswith(b"data: [DONE]\n\n")) == (asks, True, True)
        found = await listed(at)
        assert found["ci"]["today"] == found["ci"]["month"] == {"requests": 2, "prompt_tokens": 14, "completion_tokens": 6}


async def test_usage_is_told_by_key_and_model(folder: Path) -> None:
    async with house(folder, ONE, TWO) as at:
        a, b = await key(at, "a"), await key(at, "b")
        for header, model in ((a, "one"), (a, "uno"), (a, "two"), (b, "two")):
            await served(at, header, model=model)
        rows = [
            {"key": name, "model": model, "requests": count, "prompt_tokens": 3 * count, "completion_tokens": 4 * count}
            for name, model, count in (("a", "one", 2), ("a", "two", 1), ("b", "two", 1))
        ]
        assert (await at.operate("GET", "/keys/usage")).json == {"since": None, "usage": rows}
        assert (await at.operate("GET", "/keys/usage?name=b")).json["usage"] == rows[2:]
        assert (await at.operate("GET", "/keys/usage?since=2999-01-01")).json["usage"] == []
        assert (await listed(at))["a"]["last_used_at"] <= time.time()
