"""What `explain` shows: lines that add up to the card, whatever was decided, and words on what would change a limit."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy import explain
from orchestrator.policy.admission import reserve_bytes
from orchestrator.policy.decide import PoolView
from orchestrator.policy.instance import HAS_ENGINE, State
from orchestrator.policy.snapshot import GpuReading, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB
from tests.policy.test_decide import BUNDLE, Box, card, known
from tests.policy.test_decide_properties import RULES, World, look, worlds

PARTS = {"reserve", "foreign", "fixed", "kv", "claim", "room"}


@st.composite
def watched(draw: st.DrawFn) -> World:
    """Any state of the models, with strangers on the cards, some of whom the driver names, and requests of every size."""
    world: World = draw(worlds())
    snapshot = world.snapshot
    gpus = {}
    for uuid, gpu in snapshot.gpus.items():
        strangers = {pid: draw(st.integers(0, 40)) * GIB for pid in range(7000, 7000 + draw(st.integers(0, 3)))}
        gpus[uuid] = replace(gpu, processes={} if draw(st.booleans()) and draw(st.booleans()) else {**gpu.processes, **strangers})
    traffic = {
        name: replace(seen, largest_tokens=draw(st.sampled_from((0, 100, 1 << 30))), waiting_tokens=draw(st.sampled_from((0, 5000))))
        for name, seen in snapshot.traffic.items()
    }
    return World(world.known, world.instances, replace(snapshot, gpus=gpus, traffic=traffic))


@look
@given(watched())
def test_lines_sum_to_the_card_and_the_room_is_what_is_free(world: World) -> None:
    plan = world.plan()
    for uuid, gpu in world.snapshot.gpus.items():
        rows = explain.lines(uuid, world.snapshot, plan)
        assert {row.what for row in rows} <= PARTS
        assert sum(row.bytes for row in rows) == gpu.total_bytes
        by_what = {what: sum(row.bytes for row in rows if row.what == what) for what in PARTS}
        budget = plan.gpus[uuid]
        assert by_what["reserve"] == reserve_bytes(gpu, RULES)
        assert by_what["claim"] == budget.claims_bytes
        assert by_what["room"] == gpu.free_bytes - budget.reserve_bytes - budget.claims_bytes
        assert by_what["fixed"] + by_what["kv"] + by_what["foreign"] == gpu.used_bytes


@look
@given(watched())
def test_nobody_of_ours_is_called_foreign_and_every_stranger_is_named(world: World) -> None:
    plan = world.plan()
    ours = {i.launch.id: i for i in plan.instances.values() if i.launch and i.state in HAS_ENGINE}
    for uuid, gpu in world.snapshot.gpus.items():
        rows = explain.lines(uuid, world.snapshot, plan)
        engines = [world.snapshot.engines[key] for key, i in ours.items() if key in world.snapshot.engines and uuid in i.launch.gpus]  # type: ignore[union-attr]
        pids = {pid for seen in engines for pid in seen.pids}
        named = {row.pid: row.bytes for row in rows if row.pid is not None}
        assert named == {pid: size for pid, size in gpu.processes.items() if pid not in pids and size}
        assert all(row.what == "foreign" and row.model is None for row in rows if row.pid is not None)
        assert all((row.model is not None) == (row.what in ("fixed", "kv", "claim")) for row in rows)
        assert [row.what for row in rows].count("room") == [row.what for row in rows].count("reserve") == 1


def test_a_card_line_by_line() -> None:
    """140 GiB: a holds 18 + 6 of KV, a stranger 30, the driver 1; b starts and has taken 5 of its 20, with 2 of KV promised."""
    box = Box({"a": known("a"), "b": known("b"), "c": known("c")}, [card(0, 80, {1: 24, 2: 5, 66: 30})])
    box.runs("a", mapped=6, limit=50, pids=frozenset({1}))
    box.runs("b", mapped=0, limit=0, state=State.STARTING, segment=None, ready=False, pids=frozenset({2}))
    plan = box.look()
    snapshot = replace(look_of(box), now=1000.0)
    rows = [(row.what, row.bytes / GIB, row.model, row.pid) for row in explain.lines("GPU-0", snapshot, plan)]
    assert rows == [
        ("reserve", 4, None, None),
        ("fixed", 18, "a", None),
        ("kv", 6, "a", None),
        ("fixed", 5, "b", None),
        ("claim", 17, "b", None),
        ("foreign", 30, None, 66),
        ("foreign", 1, None, None),
        ("room", 59, None, None),
    ]


def test_what_a_stranger_took_too_much_is_missing() -> None:
    box = Box({"a": known("a")}, [card(0, 1, {1: 24, 66: 115})])
    box.runs("a", mapped=6, limit=50, pids=frozenset({1}))
    plan = box.look()
    room = explain.lines("GPU-0", look_of(box), plan)[-1]
    assert (room.what, room.bytes) == ("room", -3 * GIB)
    assert "missing" in room.why


def test_one_that_waits_shows_its_claim() -> None:
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 10, {1: 129})], {"b": TrafficSeen(waiting=1)})
    box.runs("a", mapped=60, limit=80, pids=frozenset({1}))
    plan = box.look()
    assert plan.instances["b"].reserved
    (claim,) = (row for row in explain.lines("GPU-0", look_of(box), plan) if row.what == "claim")
    assert (claim.model, claim.bytes) == ("b", 22 * GIB)
    assert "starts when it is seen free" in claim.why


def look_of(box: Box) -> Snapshot:
    return Snapshot(box.now, {gpu.uuid: gpu for gpu in box.gpus}, box.engines, box.traffic)


# ---- what would change a limit --------------------------------------------------------------------------------------


def view(**fields: Any) -> PoolView:
    """A pool of 10 bundles between 2 and 20, which has what it needs."""
    sizes = {
        "floor_bytes": 2,
        "ceiling_bytes": 20,
        "limit_bytes": 10,
        "sure_bytes": 10,
        "target_bytes": 10,
        "demand_bytes": 5,
        "charge_bytes": 10,
    }
    given = {key: value * BUNDLE for key, value in {**sizes, **{k: v for k, v in fields.items() if k in sizes}}.items()}
    rest = {"weight": 1.0, "status": "applied", "reason": "a share of the surplus", "short": False, "bundle_bytes": BUNDLE}
    return PoolView(**{**rest, **given, **{k: v for k, v in fields.items() if k not in sizes}})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "another weight"),
        ({"short": True, "status": "draining"}, "stop a model, lower a floor"),
        ({"status": "draining", "target_bytes": 4}, "its requests ending: 512MiB"),
        ({"target_bytes": 16}, "memory that is seen free: up to 2048MiB"),
        ({"limit_bytes": 20, "target_bytes": 20}, "nothing: it is at its ceiling"),
        ({"limit_bytes": 20, "target_bytes": 20, "demand_bytes": 20}, "a higher kv_ceiling"),
        ({"demand_bytes": 15}, "others needing less, a higher floor, or a higher priority"),
    ],
)
def test_the_words(fields: dict[str, Any], says: str) -> None:
    assert says in explain.change(view(**fields))


@look
@given(watched())
def test_every_pool_has_words(world: World) -> None:
    for pool in world.plan().pools.values():
        assert len(explain.change(pool)) > 10
        assert pool.sure_bytes <= max(pool.limit_bytes, 0)


def test_an_old_reading_is_explained_too() -> None:
    """Its figures are the last that could be read; they still add up."""
    old: GpuReading = card(0, 80, {1: 24}, error="the driver hangs")
    box = Box({"a": known("a")}, [old])
    box.runs("a", mapped=6, limit=50, pids=frozenset({1}))
    plan = box.look()
    assert sum(row.bytes for row in explain.lines("GPU-0", look_of(box), plan)) == old.total_bytes
    assert "cannot be read" in plan.pools["a"].reason
