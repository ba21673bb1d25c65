"""The operators' API on limits: bounds that change while a model runs, and an explanation whose lines add up to the card."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.policy.units import GIB, MIB
from tests.api.house import Cards, House, house
from tests.api.rawclient import Answer

FILE = {"name": "org/file", "aliases": ["f"], "source": "org/file", "kv_weight": 2}
PART = {"what", "bytes", "why", "model", "who"}

pytestmark = pytest.mark.asyncio


async def limit(at: House, name: str, **changes: Any) -> Answer:
    return await at.operate("POST", f"/models/{name}/limit", json.dumps(changes).encode())


async def model(at: House, name: str) -> Any:
    return (await at.operate("GET", f"/models/{name}")).json


async def test_a_limit_holds_at_once_without_a_new_engine(folder: Path) -> None:
    async with house(folder, FILE) as at:
        before = await model(at, "f")
        assert before["overrides"] == {}
        answer = await limit(at, "org%2Ffile", kv_ceiling="10GiB", priority=1)
        assert answer.status == 200
        shown = answer.json
        assert shown["overrides"] == {"kv_ceiling": "10GiB", "priority": 1}
        assert (shown["spec"]["kv_ceiling"], shown["spec"]["priority"], shown["spec"]["kv_weight"]) == (10 * GIB, 1, 2.0)
        await at.until(lambda: _limit_of(at) == 10 * GIB // (96 * MIB) * 96 * MIB, "its limit is at the ceiling")
        after = await model(at, "f")
        assert after["pool"]["ceiling_bytes"] == after["pool"]["limit_bytes"] <= 10 * GIB
        assert after["engine"]["launch_id"] == before["engine"]["launch_id"]
        assert [(event["kind"], event["reason"]) for event in after["events"]][-1] == ("limit", "kv_ceiling: 10GiB, priority: 1")

        back = await limit(at, "f", kv_ceiling=None, priority=None)
        assert (back.json["overrides"], back.json["spec"]["kv_ceiling"], back.json["spec"]["priority"]) == ({}, None, 0)
        assert (await model(at, "f"))["events"][-1]["reason"] == "kv_ceiling: as in its spec, priority: as in its spec"
        await at.until(lambda: _limit_of(at) > 60 * GIB, "it has the card again")


async def test_a_limit_is_for_a_model_that_is_stopped_too(folder: Path) -> None:
    async with house(folder, FILE, ready=False) as at:
        assert (await limit(at, "f", kv_weight=8)).status == 200
        shown = await model(at, "f")
        assert (shown["state"], shown["pool"], shown["spec"]["kv_weight"]) == ("stopped", None, 8.0)


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"kv_floor": "2GB"}, "kv_floor", "write 2GiB"),
        ({"kv_floor": "20GiB", "kv_ceiling": "10GiB"}, "kv_floor", "above kv_ceiling"),
        ({"kv_floor": True}, "kv_floor", "True"),
        ({"kv_weight": -1}, "kv_weight", "greater than 0"),
        ({"priority": 9}, "priority", "less than or equal to 8"),
        ({"priority": [1]}, "priority", ""),
        ({"args": ["--enforce-eager"]}, "args", "can not be changed while it runs; these can: kv_floor"),
        ({"kv_flor": "1GiB"}, "kv_flor", "these can: kv_floor, kv_ceiling, kv_weight, priority"),
    ],
)
async def test_what_is_wrong_is_a_422_that_names_it_and_nothing_is_changed(
    folder: Path, changes: dict[str, Any], field: str, says: str
) -> None:
    async with house(folder, FILE) as at:
        answer = await limit(at, "f", **changes)
        assert (answer.status, answer.error["code"]) == (422, "invalid_spec")
        (error,) = answer.error["errors"]
        assert error["field"] == field
        assert says in error["message"]
        shown = await model(at, "f")
        assert (shown["overrides"], shown["spec"]["kv_weight"]) == ({}, 2.0)
        assert "limit" not in [event["kind"] for event in shown["events"]]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"kv_floor"', b"\xff"])
async def test_what_is_no_object_is_a_400(folder: Path, body: bytes) -> None:
    async with house(folder, FILE) as at:
        answer = await at.operate("POST", "/models/f/limit", body)
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"


async def test_a_model_that_is_not_there_is_a_404_and_a_wrong_method_a_405(folder: Path) -> None:
    async with house(folder, FILE) as at:
        assert (await limit(at, "nobody", priority=1)).status == 404
        assert (await at.operate("GET", "/models/f/limit")).status == 404  # the model `f/limit`, which is not there
        assert (await at.operate("POST", "/explain", b"{}")).status == 405


async def test_explain_adds_up_line_by_line_and_says_what_would_change_each_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Cards.read

    def with_a_stranger(cards: Cards) -> Any:
        (card,) = read(cards)
        return [type(card)(card.uuid, card.index, card.name, card.total_bytes, 40 * GIB, {4242: 10 * GIB, 66: 20 * GIB})]

    monkeypatch.setattr(Cards, "read", with_a_stranger)
    async with house(folder, FILE, {"name": "down", "source": "org/file", "preload": False}) as at:
        assert at.loop.view is not None
        ticks = at.loop.view.ticks
        await at.until(lambda: at.loop.view and at.loop.view.ticks > ticks + 2, "it has looked")
        (gpu,) = (await at.operate("GET", "/explain")).json["gpus"]
        assert (gpu["index"], gpu["uuid"], gpu["error"], gpu["total_bytes"]) == (0, "GPU-0", None, 80 * GIB)
        assert all(set(line) == PART for line in gpu["lines"])
        assert sum(line["bytes"] for line in gpu["lines"]) == 80 * GIB
        whats = {line["what"]: line for line in gpu["lines"] if line["who"] is None}
        assert whats["fixed"]["model"] == whats["kv"]["model"] == "org/file"
        assert whats["kv"]["bytes"] == 96 * MIB
        (stranger,) = (line for line in gpu["lines"] if line["who"])
        assert (stranger["what"], stranger["bytes"], stranger["who"]) == ("foreign", 20 * GIB, "eve: train.py (pid 66)")
        (pool,) = gpu["pools"]
        assert (pool["model"], pool["weight"]) == ("org/file", 2.0)
        assert pool["launch_id"] in at.engines.launches
        assert pool["floor_bytes"] <= pool["limit_bytes"] <= gpu["pool_bytes"]
        assert {"target_bytes", "demand_bytes", "charge_bytes", "used_bytes", "prealloc_bytes", "ceiling_bytes", "bundle_bytes"} <= set(
            pool
        )
        assert all(pool[key] for key in ("status", "reason", "change"))


def _limit_of(at: House) -> int:
    (seen,) = at.engines.seen.values()
    return seen.segment.limit_bytes if seen.segment else 0
