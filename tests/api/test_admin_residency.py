"""The operators' API on residency: load, unload, sleep, wake, drain, pin and plan, and each refusal with what to do instead."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api.admin import Admin
from orchestrator.policy.model import ROUTE_WORDS
from orchestrator.policy.units import GIB
from tests.api.house import Cards, House, house
from tests.api.rawclient import Answer
from tests.api.test_admin_api import add, names

FILE = {"name": "org/file", "aliases": ["f"], "source": "org/file", "min_residency": 0.01}
DOWN = {"name": "down", "source": "org/down", "preload": False}
VERBS = ("load", "unload", "sleep", "wake", "drain", "pin", "unpin")

pytestmark = pytest.mark.asyncio


async def tell(at: House, verb: str, name: str = "f") -> Answer:
    return await at.operate("POST", f"/models/{name}/{verb}")


async def model(at: House, name: str = "f") -> Any:
    return (await at.operate("GET", f"/models/{name}")).json


@contextlib.asynccontextmanager
async def busy(at: House) -> AsyncIterator[None]:
    """A request that runs in the engine of org/file; it is over when this is left."""
    async with at.client() as client:
        await client.request("/v1/completions", b'{"model":"f"}')
        exchange = await at.upstream.request()
        await at.until(lambda: at.loop.view and at.loop.view.snapshot.traffic["org/file"].in_flight, "the loop has seen it")
        yield
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


# ---- each verb --------------------------------------------------------------------------------------------------------


async def test_sleep_and_wake_keep_the_engine(folder: Path) -> None:
    async with house(folder, FILE) as at:
        launch = (await model(at))["engine"]["launch_id"]
        answer = await tell(at, "sleep")
        assert (answer.status, answer.json["wanted"]) == (202, "asleep")
        await at.until_state("org/file", "asleep")
        shown = await model(at)
        assert (shown["reason"], shown["engine"]["launch_id"]) == ("put to sleep by an operator", launch)
        assert shown["pool"]["limit_bytes"] == shown["pool"]["bundle_bytes"]  # no more than what it can not do without
        assert (await tell(at, "wake")).json["wanted"] == "ready"
        await at.until_state("org/file", "ready")
        shown = await model(at)
        assert (shown["engine"]["launch_id"], shown["footprint"]["sleep_s"], shown["footprint"]["wake_s"]) == (launch, 0.5, 0.25)
        assert shown["footprint"]["host_bytes"] == 15 * GIB
        assert {"asleep_bytes", "start_s", "total_bytes"} <= shown["footprint"].keys()


async def test_a_request_wakes_what_was_put_to_sleep(folder: Path) -> None:
    async with house(folder, FILE) as at:
        await tell(at, "sleep")
        await at.until_state("org/file", "asleep")
        async with busy(at):
            assert (await model(at))["state"] == "ready"


async def test_unload_ends_the_engine_until_a_request_or_a_load(folder: Path) -> None:
    async with house(folder, FILE) as at:
        assert (await tell(at, "unload")).status == 202
        await at.until_state("org/file", "stopped")
        shown = await model(at)
        assert (shown["held"], shown["wanted"], shown["engine"], shown["reason"]) == (False, "nothing", None, "unloaded by an operator")
        assert (await tell(at, "load")).status == 202
        await at.until_state("org/file", "ready")
        assert len(at.engines.launches) == 2


async def test_load_wakes_a_model_that_sleeps(folder: Path) -> None:
    async with house(folder, FILE) as at:
        await tell(at, "sleep")
        await at.until_state("org/file", "asleep")
        assert (await tell(at, "load")).status == 202
        await at.until_state("org/file", "ready")
        assert len(at.engines.launches) == 1


async def test_drain_lets_requests_end_and_then_unloads(folder: Path) -> None:
    async with house(folder, FILE) as at:
        async with busy(at):
            assert (await tell(at, "drain")).status == 202
            await at.until_state("org/file", "draining")
        await at.until_state("org/file", "stopped")
        assert (await model(at))["held"] is False


async def test_a_pin_is_an_override_and_is_undone(folder: Path) -> None:
    async with house(folder, FILE) as at:
        answer = await tell(at, "pin")
        assert (answer.status, answer.json["spec"]["pinned"], answer.json["overrides"]) == (202, True, {"pinned": True})
        answer = await tell(at, "unpin")
        assert (answer.status, answer.json["spec"]["pinned"], answer.json["overrides"]) == (202, False, {})


async def test_a_pin_of_the_spec_is_overridden_by_unpin_alone(folder: Path) -> None:
    async with house(folder, {**FILE, "pinned": True}) as at:
        assert (await tell(at, "pin")).json["overrides"] == {}
        answer = await tell(at, "unpin")
        assert (answer.json["spec"]["pinned"], answer.json["overrides"]) == (False, {"pinned": False})
        assert (await tell(at, "pin")).json["overrides"] == {}


async def test_each_order_is_an_event(folder: Path) -> None:
    async with house(folder, FILE) as at:
        for verb in ("pin", "unpin", "sleep", "wake", "load", "unload"):
            assert (await tell(at, verb)).status == 202, verb
        kinds = [event["kind"] for event in (await model(at))["events"]]
        assert [kind for kind in kinds if kind in VERBS] == ["pin", "unpin", "sleep", "wake", "load", "unload"]


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "says"), [("unload", "it can not be unloaded now"), ("sleep", "it can not sleep now")])
async def test_a_busy_model_is_a_409_that_names_drain(folder: Path, verb: str, says: str) -> None:
    async with house(folder, FILE) as at, busy(at):
        answer = await tell(at, verb)
        assert (answer.status, answer.error["code"]) == (409, "busy")
        assert answer.error["message"] == f"'org/file' has 1 request: {says}; `orchestratorctl drain org/file` lets them end first."
        assert at.state("org/file") == "ready"


@pytest.mark.parametrize(
    ("verb", "says"),
    [*((verb, "`orchestratorctl start org/file` first") for verb in ("load", "unload", "wake", "drain")), ("sleep", "could sleep")],
)
async def test_a_model_that_is_held_down_is_a_409(folder: Path, verb: str, says: str) -> None:
    async with house(folder, FILE) as at:
        await tell(at, "stop")
        await at.until_state("org/file", "stopped")
        answer = await tell(at, verb)
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert says in answer.error["message"]
        assert (await model(at))["held"] is True


@pytest.mark.parametrize("verb", [*VERBS, "plan"])
async def test_an_unknown_model_is_a_404(folder: Path, verb: str) -> None:
    async with house(folder, FILE) as at:
        answer = await at.operate("GET" if verb == "plan" else "POST", f"/models/org%2Ffil/{verb}")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "Did you mean 'org/file'?" in answer.error["message"]


async def test_what_has_no_engine_is_not_woken_but_loaded(folder: Path) -> None:
    async with house(folder, DOWN) as at:
        answer = await tell(at, "wake", "down")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert "`orchestratorctl load down` starts it" in answer.error["message"]
        answer = await tell(at, "sleep", "down")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert "nothing that could sleep" in answer.error["message"]


async def test_a_model_that_starts_can_not_sleep_yet(folder: Path) -> None:
    async with house(folder) as at:
        at.engines.slow.add("qwen")
        await add(at, name="qwen", source="org/qwen")
        await at.until_state("qwen", "starting")
        answer = await tell(at, "sleep", "qwen")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert "it can sleep once it is ready; `orchestratorctl unload qwen` ends it" in answer.error["message"]
        assert at.state("qwen") == "starting"


async def test_a_model_that_starts_for_requests_has_nothing_to_drain(folder: Path) -> None:
    async with house(folder) as at:
        at.engines.slow.add("qwen")
        await add(at, name="qwen", source="org/qwen")
        await at.until_state("qwen", "starting")
        async with at.client() as client:
            await client.request("/v1/completions", b'{"model":"qwen"}')
            await at.until(lambda: at.loop.requests("qwen").waiting, "the request waits")
            answer = await tell(at, "drain", "qwen")
        assert (answer.status, answer.error["code"]) == (409, "busy")
        assert "'qwen' is starting, and 1 request waits for it" in answer.error["message"]
        assert "`orchestratorctl stop qwen` turns them away" in answer.error["message"]
        await at.until(lambda: not at.loop.requests("qwen").waiting, "its client has gone")
        assert (await tell(at, "drain", "qwen")).status == 202
        await at.until_state("qwen", "stopped")


async def test_a_model_that_never_sleeps_is_unloaded_instead(folder: Path) -> None:
    async with house(folder, {**FILE, "sleep_level": 0}) as at:
        answer = await tell(at, "sleep")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert "sleep_level 0. `orchestratorctl unload org/file` frees its memory" in answer.error["message"]


# ---- plan -------------------------------------------------------------------------------------------------------------


async def plan(at: House, name: str = "down") -> Any:
    ticks = at.loop.view.ticks if at.loop.view else 0
    await at.until(lambda: at.loop.view and at.loop.view.ticks > ticks + 2, "it has looked")
    answer = await at.operate("GET", f"/models/{name}/plan")
    assert answer.status == 200
    assert at.state("down") == "stopped"  # nothing is done
    return answer.json


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """`full`: of 80 GiB, the one engine that runs holds 70, and 5 are free. The observer takes the method as it is when it is made."""
    read, now = Cards.read, {"full": False}

    def with_one_engine(cards: Cards) -> Any:
        (empty,) = read(cards)
        return [replace(empty, free_bytes=5 * GIB, processes={4242: 70 * GIB}) if now["full"] else empty]

    monkeypatch.setattr(Cards, "read", with_one_engine)
    return now


async def test_a_plan_of_what_fits(folder: Path) -> None:
    async with house(folder, FILE, DOWN) as at:
        found = await plan(at)
        assert found["fits"] == "now"
        assert found["need_bytes"] == sum(found["need"].values())
        *limits, step = found["steps"]
        assert all((lower["what"], lower["model"], lower["seconds"]) == ("limit", "org/file", None) for lower in limits)
        assert (step["what"], step["model"], step["bytes"]) == ("start", "down", -found["need_bytes"])
        assert found["seconds"] == step["seconds"] > 0
        assert found["retry_in_s"] is None


async def test_a_plan_names_who_goes_for_it(folder: Path, card: dict[str, bool]) -> None:
    async with house(folder, FILE, DOWN) as at:
        card["full"] = True
        found = await plan(at)
        assert found["fits"] == "after"
        first, last = (step for step in found["steps"] if step["what"] != "limit")
        assert (first["what"], first["model"]) == ("sleep", "org/file")
        assert first["bytes"] > 0
        assert first["seconds"] > 0
        assert first["why"].startswith("makes room for down: idle for ")
        assert (last["what"], last["model"]) == ("start", "down")
        assert at.state("org/file") == "ready"


async def test_a_plan_of_what_does_not_fit_yet_says_when(folder: Path, card: dict[str, bool]) -> None:
    async with house(folder, {**FILE, "min_residency": "1h"}, DOWN) as at:
        card["full"] = True
        found = await plan(at)
        assert (found["fits"], found["steps"], found["seconds"]) == ("later", [], None)
        assert "org/file came less than 3600s ago" in found["why"]
        assert 3000 < found["retry_in_s"] <= 3600


async def test_a_plan_of_what_a_pin_keeps_out_knows_no_time(folder: Path, card: dict[str, bool]) -> None:
    async with house(folder, {**FILE, "pinned": True}, DOWN) as at:
        card["full"] = True
        found = await plan(at)
        assert (found["fits"], found["retry_in_s"]) == ("later", None)
        assert "org/file is pinned" in found["why"]


async def test_a_plan_of_what_stop_holds_down_says_so(folder: Path) -> None:
    async with house(folder, FILE, DOWN) as at:
        assert (await plan(at))["held"] is False
        await tell(at, "stop", "down")
        found = await plan(at)
        assert (found["held"], found["fits"]) == (True, "now")
        assert (await tell(at, "load", "down")).status == 409


async def test_a_plan_of_what_is_there_has_no_steps(folder: Path) -> None:
    async with house(folder, FILE, DOWN) as at:
        found = await plan(at, "org%2Ffile")
        assert (found["fits"], found["model"], found["steps"], found["seconds"]) == ("ready", "org/file", [], 0.0)


async def test_a_plan_of_what_sleeps_is_a_wake(folder: Path) -> None:
    async with house(folder, FILE, DOWN) as at:
        await tell(at, "sleep")
        await at.until_state("org/file", "asleep")
        found = await plan(at, "f")
        assert (found["fits"], [step["what"] for step in found["steps"] if step["what"] != "limit"]) == ("now", ["wake"])
        assert set(found["need"]) == {"weights and the rest", "KV floor"}
        assert at.state("org/file") == "asleep"


# ---- status, and names ------------------------------------------------------------------------------------------------


async def test_status_counts_the_host_memory_of_those_that_sleep(folder: Path) -> None:
    async with house(folder, FILE) as at:
        assert (await at.operate("GET", "/status")).json["host"] == {"sleepers_bytes": 0, "budget_bytes": 64 * GIB}
        await tell(at, "sleep")
        await at.until_state("org/file", "asleep")
        status = (await at.operate("GET", "/status")).json
        assert (status["models"], status["host"]["sleepers_bytes"]) == ({"asleep": 1}, 15 * GIB)


@pytest.mark.parametrize("word", sorted(ROUTE_WORDS))
async def test_a_name_that_ends_with_a_word_of_a_route_is_refused(folder: Path, word: str) -> None:
    """`/models/x/logs` is the log of x. A word alone is a name like any other."""
    async with house(folder) as at:
        for fields in ({"name": f"x/{word}"}, {"name": "y", "aliases": [f"org/x/{word}"]}):
            answer = await add(at, "?start=false", source="a/b", **fields)
            assert answer.status == 422
            (error,) = answer.error["errors"]
            assert error["field"] == ("aliases" if "aliases" in fields else "name")
            assert f"x-{word}" in error["message"]
        assert (await add(at, "?start=false", name=word, source="a/b", aliases=[f"{word}/x", f"x/{word}s"])).status == 201
        assert (await at.operate("GET", f"/models/{word}")).json["name"] == word
        assert await names(at) == [word]


async def test_every_word_behind_a_name_is_one_that_no_name_ends_with() -> None:
    admin = Admin.__new__(Admin)  # its routes need nothing of it
    paths = [getattr(route, "path", "") for route in admin.router().routes]
    assert {path.rpartition("{name:path}/")[2] for path in paths if "{name:path}/" in path} == ROUTE_WORDS
