"""Decisions between models: who may start and when, what is claimed for it, and what happens where a GPU cannot be read.

Each test is a few looks at one small box: cards of 140 GiB with 4 GiB in reserve, models that need whole GiB.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from orchestrator.policy.actions import SetLimit, Start, Stop
from orchestrator.policy.admission import reserve_bytes
from orchestrator.policy.budgets import PoolMemory
from orchestrator.policy.decide import Plan, decide
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import Instance, Launch, State
from orchestrator.policy.lifecycle import Known, Rules
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB, MIB

RULES = Rules(reserve_bytes=4 * GIB)
BUNDLE = 128 * MIB
ASKED = TrafficSeen(waiting=1)
S = State


def known(name: str, start: int = 20, floor: int = 2, **fields: Any) -> Known:
    spec = ModelSpec.model_validate({"name": name, "source": f"org/{name}", "kv_floor": f"{floor}GiB", **fields})
    return Known(spec, Footprint("estimated", start_bytes=start * GIB, ready_bytes=(start - 2) * GIB, bundle_bytes=BUNDLE, start_s=4.5))


def card(index: int, free: float, processes: Mapping[int, int] | None = None, error: str | None = None) -> GpuReading:
    held = {pid: size * GIB for pid, size in (processes or {}).items()}
    return GpuReading(f"GPU-{index}", index, "H200", 140 * GIB, int(free * GIB), held, error=error)


@dataclass
class Box:
    """The daemon's side of the loop: what it carries from one look to the next."""

    models: dict[str, Known]
    gpus: list[GpuReading]
    traffic: dict[str, TrafficSeen] = field(default_factory=dict)
    engines: dict[str, EngineSeen] = field(default_factory=dict)
    instances: Mapping[str, Instance] = field(default_factory=dict)
    memory: Mapping[str, PoolMemory] = field(default_factory=dict)
    now: float = 1000.0
    ids: int = 0

    def look(self) -> Plan:
        snapshot = Snapshot(self.now, {gpu.uuid: gpu for gpu in self.gpus}, self.engines, self.traffic)
        plan = decide(self.models, self.instances, self.memory, snapshot, RULES, self.launch_id)
        self.instances, self.memory = plan.instances, plan.pool_memory
        self.now += 0.25
        return plan

    def launch_id(self) -> str:
        self.ids += 1
        return f"n{self.ids}"

    def runs(self, name: str, mapped: float, limit: float, gpus: tuple[int, ...] = (0,), state: State = S.READY, **seen: Any) -> None:
        """A model that has an engine already, with so much KV mapped and so large a limit (GiB)."""
        launch = Launch(name, f"orch-{name}", self.models[name].spec, tuple(f"GPU-{n}" for n in gpus), 20 * GIB, 2 * GIB, 100 * GIB)
        self.instances = {**self.instances, name: Instance(name, state, self.now - 500, "as before", launch)}
        segment = Segment(int(limit * GIB), int(mapped * GIB), 0)
        fields: dict[str, Any] = {"alive": True, "ready": True, "segment": segment, "capacity_bytes": 100 * GIB, "bundle_bytes": BUNDLE}
        self.engines[name] = EngineSeen(name, **(fields | seen))
        self.traffic.setdefault(name, TrafficSeen(last_used=self.now))


def starts(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {action.launch.spec.name: action.launch.gpus for action in plan.actions if isinstance(action, Start)}


def limits(plan: Plan) -> dict[str, int]:
    return {action.model: action.limit_bytes for action in plan.actions if isinstance(action, SetLimit)}


def states(plan: Plan) -> dict[str, State]:
    return {name: instance.state for name, instance in plan.instances.items()}


def test_a_model_that_is_asked_for_starts_at_once_where_there_is_room() -> None:
    plan = Box({"a": known("a"), "b": known("b")}, [card(0, 50), card(1, 139)], {"a": ASKED}).look()
    assert starts(plan) == {"a": ("GPU-1",)}
    assert states(plan) == {"a": S.STARTING, "b": S.STOPPED}
    assert plan.instances["a"].reason == "1 requests; the 22.0GiB that it needs are free on GPU 1"
    assert plan.gpus["GPU-1"].claims_bytes == 22 * GIB
    assert plan.gpus["GPU-1"].pool_bytes == (139 - 4 - 22) * GIB


def test_what_a_launch_is_given() -> None:
    plan = Box({"a": known("a", 20, 2)}, [card(0, 139)], {"a": ASKED}).look()
    launch = next(action.launch for action in plan.actions if isinstance(action, Start))
    assert launch == plan.instances["a"].launch
    assert (launch.id, launch.ipc_name, launch.expected_start_s) == ("n1", "orch-a-n1", 4.5)
    assert (launch.claim_bytes, launch.floor_bytes, launch.ceiling_bytes) == (20 * GIB, 2 * GIB, (140 - 4 - 18) * GIB)


@pytest.mark.parametrize(("ceiling", "bundles"), [("10GiB", 80), (10 * GIB - 1, 79), (1, 1), (None, 800)])
def test_a_ceiling_of_the_operator_holds_at_once_and_in_whole_bundles(ceiling: Any, bundles: int) -> None:
    """It is read from the present spec at every look: an engine need not start again for it."""
    box = Box({"a": known("a")}, [card(0, 100)])
    box.runs("a", mapped=0, limit=2)
    box.models["a"] = known("a", 20, 0, kv_ceiling=ceiling)
    view = box.look().pools["a"]
    assert view.ceiling_bytes == bundles * BUNDLE
    assert view.floor_bytes == min(2, bundles) * BUNDLE


def test_a_launch_may_address_all_that_the_card_could_give() -> None:
    launch = Box({"a": known("a", 20, 0, kv_ceiling="10GiB")}, [card(0, 139)], {"a": ASKED}).look().instances["a"].launch
    assert launch is not None
    assert launch.ceiling_bytes == (140 - 4 - 18) * GIB


def test_an_ipc_name_is_short_and_its_own() -> None:
    box = Box({name: known(name) for name in ("x" * 100, "x" * 101)}, [card(0, 139), card(1, 139)], {"x" * 100: ASKED, "x" * 101: ASKED})
    launches = [action.launch for action in box.look().actions if isinstance(action, Start)]
    assert all(len(launch.ipc_name) <= 40 for launch in launches)
    assert len({launch.ipc_name for launch in launches}) == 2


def test_one_start_a_gpu_at_a_time_by_priority_then_by_waiting() -> None:
    models = {"a": known("a"), "b": known("b", priority=1), "c": known("c")}
    box = Box(models, [card(0, 139)], {"a": ASKED, "b": ASKED})
    plan = box.look()
    assert starts(plan) == {"b": ("GPU-0",)}
    assert (plan.instances["a"].state, plan.instances["a"].reason) == (S.WAITING, "another engine starts or wakes on its GPU")
    box.engines["n1"] = EngineSeen("n1", alive=True)
    box.traffic = {name: ASKED for name in models}
    assert starts(box.look()) == {}
    box.engines["n1"] = EngineSeen("n1", alive=True, ready=True, segment=Segment(2 * GIB, 0, 0), capacity_bytes=GIB, bundle_bytes=BUNDLE)
    plan = box.look()
    assert starts(plan) == {"a": ("GPU-0",)}, "c came later"
    assert states(plan) == {"a": S.STARTING, "b": S.READY, "c": S.WAITING}


def test_two_gpus_two_starts() -> None:
    models = {"a": known("a"), "b": known("b"), "c": known("c")}
    plan = Box(models, [card(0, 139), card(1, 139)], {name: ASKED for name in models}).look()
    assert starts(plan) == {"a": ("GPU-0",), "b": ("GPU-1",)}
    assert states(plan)["c"] is S.WAITING


def test_a_tensor_parallel_start_claims_on_each_gpu_and_takes_the_turn_of_each() -> None:
    models = {"a": known("a", priority=1, tensor_parallel_size=2), "b": known("b")}
    plan = Box(models, [card(0, 139), card(1, 139), card(2, 100)], {"a": ASKED, "b": ASKED}).look()
    assert starts(plan) == {"a": ("GPU-0", "GPU-1"), "b": ("GPU-2",)}
    assert [plan.gpus[f"GPU-{n}"].claims_bytes for n in range(3)] == [22 * GIB] * 3


def test_a_claim_shrinks_as_the_engine_takes_what_was_claimed() -> None:
    box = Box({"a": known("a")}, [card(0, 139)], {"a": ASKED})
    box.look()
    seen = EngineSeen("n1", alive=True, pids=frozenset({7}))
    claims = []
    for held, segment in ((0, None), (5, None), (30, None), (6, Segment(118 * GIB, GIB, 0)), (25, Segment(118 * GIB, GIB, 0))):
        box.gpus = [card(0, 139 - held, {7: held, 8: 1})]
        box.engines["n1"] = replace(seen, segment=segment, capacity_bytes=118 * GIB, bundle_bytes=BUNDLE)
        claims.append(box.look().gpus["GPU-0"].claims_bytes // GIB)
    assert claims == [22, 17, 0, 15, 0]
    box.engines["n1"] = replace(box.engines["n1"], ready=True)
    box.gpus = [card(0, 129, {7: 10})]
    assert box.look().gpus["GPU-0"].claims_bytes == 0, "what a ready engine has not taken it does not need"


def test_the_limit_of_a_new_segment_is_cut_at_first_sight() -> None:
    """An engine starts with a limit of all that it could address; the claim's rest and the reserve are not in it."""
    box = Box({"a": known("a")}, [card(0, 139)], {"a": ASKED})
    box.look()
    box.engines["n1"] = EngineSeen(
        "n1", alive=True, pids=frozenset({7}), segment=Segment(118 * GIB, 0, 0), capacity_bytes=118 * GIB, bundle_bytes=BUNDLE
    )
    box.gpus = [card(0, 60, {7: 10, 8: 69})]
    plan = box.look()
    assert states(plan)["a"] is S.STARTING
    assert 2 * GIB <= limits(plan)["a"] <= (60 - 4 - 10) * GIB


def reserving() -> Box:
    """`old` holds 100 of 140 GiB in KV, all but 2 of it above its floor; `new` needs 22, of which 16 are seen free."""
    box = Box({"old": known("old", pinned=True), "new": known("new")}, [card(0, 20)], {"new": ASKED})
    box.runs("old", mapped=100, limit=100)
    return box


def test_first_its_bytes_are_reserved_then_it_starts_when_they_are_seen() -> None:
    box = reserving()
    plan = box.look()
    new = plan.instances["new"]
    assert (new.state, new.reserved, starts(plan)) == (S.WAITING, True, {})
    assert new.reason == "22.0GiB are promised to it; others are giving them back"
    assert plan.gpus["GPU-0"].claims_bytes == 22 * GIB
    assert limits(plan)["old"] <= (20 + 100 - 4 - 22) * GIB
    for _ in range(3):  # nothing has come back yet: the promise stands, once
        plan = box.look()
        assert (plan.instances["new"].reserved, plan.gpus["GPU-0"].claims_bytes, starts(plan)) == (True, 22 * GIB, {})
    box.runs("old", mapped=94, limit=94)
    box.gpus = [card(0, 26)]
    plan = box.look()
    assert starts(plan) == {"new": ("GPU-0",)}
    assert (plan.instances["new"].reserved, plan.gpus["GPU-0"].claims_bytes) == (False, 22 * GIB)


def test_a_promise_that_a_foreign_process_breaks_is_given_up() -> None:
    box = reserving()
    box.look()
    box.runs("old", mapped=10, limit=94)
    box.gpus = [card(0, 15)]  # 100 - 10 came back and 95 went to somebody else
    plan = box.look()
    new = plan.instances["new"]
    assert (new.state, new.reserved, new.launch) == (S.WAITING, False, None)
    assert new.reason.startswith("it needs 22.0GiB on a GPU; beside the floors of the others GPU 0 has 19.0GiB; 3072MiB are missing")
    assert plan.gpus["GPU-0"].claims_bytes == 0


def test_a_reserved_model_that_is_no_longer_wanted_gives_its_promise_back() -> None:
    box = reserving()
    box.look()
    del box.models["new"]
    plan = box.look()
    assert "new" not in plan.instances
    assert plan.gpus["GPU-0"].claims_bytes == 0


def test_what_is_promised_to_one_is_not_given_to_another() -> None:
    """16 GiB are free, and `late` needs no more; but they are promised."""
    box = reserving()
    box.models["late"] = known("late", start=10, floor=2)
    box.look()
    box.traffic["late"] = ASKED
    plan = box.look()
    assert starts(plan) == {}
    assert (plan.instances["new"].reserved, plan.instances["late"].reserved) == (True, False)
    assert plan.instances["late"].reason == "another engine starts or wakes on its GPU"


def test_one_that_cannot_be_placed_does_not_hold_up_the_line() -> None:
    models = {"big": known("big", start=200, priority=8), "small": known("small")}
    plan = Box(models, [card(0, 139)], {"big": ASKED, "small": ASKED}).look()
    assert starts(plan) == {"small": ("GPU-0",)}
    assert plan.instances["big"].reason == (
        "it needs 202.0GiB on a GPU; beside the floors of the others GPU 0 has 135.0GiB; 67.0GiB are missing: no engine of ours holds them"
    )


def test_floors_of_those_that_run_are_not_for_the_taking() -> None:
    box = Box({"old": known("old", pinned=True), "new": known("new", start=20, floor=2)}, [card(0, 27.9)], {"new": ASKED})
    box.runs("old", mapped=0, limit=20)
    plan = box.look()
    assert plan.instances["new"].reason == (
        "it needs 22.0GiB on a GPU; beside the floors of the others GPU 0 has 21.9GiB; 102MiB are missing: old is pinned"
    )
    box.gpus = [card(0, 28)]
    assert starts(box.look()) == {"new": ("GPU-0",)}


def test_a_gpu_that_cannot_be_read_keeps_its_limits_and_takes_no_start() -> None:
    box = Box({"old": known("old"), "new": known("new"), "there": known("there", gpus=[0])}, [card(0, 1, error="NVML hangs"), card(1, 60)])
    box.runs("old", mapped=50, limit=100)
    box.traffic |= {"new": ASKED, "there": ASKED}
    plan = box.look()
    assert limits(plan) == {}
    assert (plan.pools["old"].limit_bytes, plan.pools["old"].reason) == (100 * GIB, "its GPU cannot be read: left as it is")
    assert starts(plan) == {"new": ("GPU-1",)}
    assert plan.instances["there"].reason == "its GPUs cannot be read: NVML hangs"
    box.gpus[0] = card(0, 1)
    assert limits(box.look())["old"] < 100 * GIB


@pytest.mark.parametrize(("start", "arithmetic"), [(20, ""), (40, "it needs 42.0GiB on a GPU; beside .* GPU 0 has 36.0GiB; ")])
def test_where_a_gpu_is_kept_for_another_that_is_the_reason(start: int, arithmetic: str) -> None:
    box = Box({"old": known("old"), "first": known("first", 50), "second": known("second", start)}, [card(0, 40)])
    box.runs("old", mapped=2, limit=2)
    came, waits = replace(box.instances["old"], since=box.now - 1), Instance("first", S.WAITING, box.now - 400)
    box.instances = {"old": came, "first": waits, "second": Instance("second", S.WAITING, box.now)}
    box.traffic = {"old": TrafficSeen(in_flight=1), "first": ASKED, "second": ASKED}
    plan = box.look()
    assert starts(plan) == {}
    assert re.fullmatch(f"{arithmetic}its GPU is kept for first: first in line", plan.instances["second"].reason)


def test_a_pool_over_a_gpu_that_cannot_be_read_is_left_alone_by_its_neighbours() -> None:
    """It has 40 GiB mapped and may take 60: the neighbour gets what is left of 100, not what is mapped."""
    box = Box({"wide": known("wide", tensor_parallel_size=2), "near": known("near")}, [card(0, 64), card(1, 64, error="gone")])
    box.runs("wide", mapped=40, limit=60, gpus=(0, 1))
    box.runs("near", mapped=0, limit=2)
    box.traffic["near"] = TrafficSeen(in_flight=1)
    for _ in range(20):
        plan = box.look()
        box.runs("near", mapped=0, limit=plan.pools["near"].limit_bytes / GIB)
        assert "wide" not in limits(plan)
        assert plan.pools["near"].limit_bytes <= (64 + 40 - 4 - 60) * GIB
    assert plan.pools["near"].limit_bytes > 30 * GIB


def test_a_gpu_that_is_not_here_is_named() -> None:
    plan = Box({"a": known("a", gpus=[5, "GPU-x", 0])}, [card(0, 10)], {"a": ASKED}).look()
    assert plan.instances["a"].reason == "no GPU here is 5, GPU-x"
    assert Box({"a": known("a")}, [], {"a": ASKED}).look().instances["a"].state is S.WAITING


def test_a_removed_model_drains_stops_and_vanishes() -> None:
    box = Box({"a": known("a")}, [card(0, 100, {7: 30})])
    box.runs("a", mapped=5, limit=50, pids=frozenset({7}))
    box.models = {}
    box.traffic = {"a": TrafficSeen(in_flight=1, last_used=box.now)}
    assert states(box.look()) == {"a": S.DRAINING}
    assert states(box.look()) == {"a": S.DRAINING}
    box.traffic = {}
    plan = box.look()
    assert states(plan) == {"a": S.STOPPING}
    assert [action for action in plan.actions if isinstance(action, Stop)] == [Stop("a", "a", "removed")]
    assert plan.pools == {}
    box.engines["a"] = replace(box.engines["a"], alive=False, gone=True)
    assert states(box.look()) == {"a": S.STOPPING}, "NVML still shows its memory"
    box.gpus = [card(0, 130)]
    assert states(box.look()) == {}


def test_a_pool_that_is_being_ended_is_nobodys() -> None:
    """Its bytes are not free and not pool memory until NVML shows that they came back."""
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 14, {7: 100})])
    box.runs("a", mapped=80, limit=80, state=S.STOPPING, pids=frozenset({7}))
    box.runs("b", mapped=5, limit=5)
    box.traffic["b"] = TrafficSeen(in_flight=1)
    plan = box.look()
    assert plan.gpus["GPU-0"].pool_bytes == (14 + 5 - 4) * GIB
    assert plan.pools.keys() == {"b"}
    assert limits(plan)["b"] <= 15 * GIB


def test_shrinks_stand_before_grows() -> None:
    """`a` starves beside `b` and `c`, which hold 40 GiB each that they do not use; it grows into what nobody holds."""
    box = Box({name: known(name) for name in "abc"}, [card(0, 94)])
    box.runs("a", mapped=2, limit=2)
    box.runs("b", mapped=0, limit=40)
    box.runs("c", mapped=0, limit=120)
    box.traffic["a"] = TrafficSeen(in_flight=9)
    box.engines["c"] = replace(box.engines["c"], segment=Segment(40 * GIB, 0, 0), capacity_bytes=10 * GIB)
    moves = [action for action in box.look().actions if isinstance(action, SetLimit)]
    assert {"a", "c"} <= {move.model for move in moves}
    assert [move.limit_bytes > move.was_bytes for move in moves] == sorted(move.limit_bytes > move.was_bytes for move in moves)
    assert all(move.reason for move in moves)


@pytest.mark.parametrize(
    ("mapped", "acked", "status"),
    [(50, 60, "applied"), (50, None, "unverified"), (50, 59, "unverified"), (70, 60, "draining")],
)
def test_the_status_of_a_limit(mapped: int, acked: int | None, status: str) -> None:
    box = Box({"a": known("a")}, [card(0, 0, error="frozen, so that the limit stays")])
    box.runs("a", mapped=mapped, limit=60, acked_limit_bytes=None if acked is None else acked * GIB)
    view = box.look().pools["a"]
    assert (view.status, view.limit_bytes) == (status, 60 * GIB)
    assert ("10.0GiB above it leave as requests finish" in view.reason) == (status == "draining")


def test_a_limit_just_written_is_not_yet_applied() -> None:
    box = Box({"a": known("a")}, [card(0, 20)])
    box.runs("a", mapped=0, limit=60, acked_limit_bytes=60 * GIB)
    assert box.look().pools["a"].status == "unverified"


@pytest.mark.parametrize(
    ("capacity", "bundle", "used", "there"),
    [(100, BUNDLE, 0, True), (0, BUNDLE, 0, True), (100, 0, 0, True), (0, 0, 0, True), (BUNDLE / GIB / 2, BUNDLE, 0, False)],
)
def test_which_pools_are_steered(capacity: float, bundle: int, used: int, there: bool) -> None:
    """Where the engine does not tell its geometry, that of the footprint and the launch counts; less than a bundle is no pool."""
    box = Box({"a": known("a")}, [card(0, 50)])
    box.runs("a", mapped=used, limit=60, capacity_bytes=int(capacity * GIB), bundle_bytes=bundle)
    plan = box.look()
    assert ("a" in plan.pools) == there
    if there:
        assert plan.pools["a"].bundle_bytes == BUNDLE


def test_weight_and_priority_of_the_present_spec_count() -> None:
    shares = {}
    for priority in (0, 1):
        box = Box({"a": known("a"), "b": known("b", priority=priority)}, [card(0, 60)])
        for name in "ab":
            box.runs(name, mapped=0, limit=2)
            box.traffic[name] = TrafficSeen(in_flight=1)
        for _ in range(60):
            plan = box.look()
            for name in "ab":
                box.runs(name, mapped=0, limit=plan.pools[name].limit_bytes / GIB)
        shares[priority] = plan.pools["b"].limit_bytes / plan.pools["a"].limit_bytes
    assert shares[0] == pytest.approx(1.0, abs=0.05)
    assert shares[1] > 1.6


def test_the_reserve_is_a_share_of_the_card_and_more_than_the_engines_own_headroom() -> None:
    assert reserve_bytes(card(0, 0), RULES) == 4 * GIB
    assert reserve_bytes(card(0, 0), Rules()) == int(0.03 * 140 * GIB)
    small = replace(card(0, 0), total_bytes=24 * GIB)
    assert reserve_bytes(small, Rules()) == int(0.02 * 24 * GIB) + GIB // 2


def test_a_sleeper_that_goes_for_one_ahead_of_it_is_not_served_in_the_same_look() -> None:
    """It waits for memory too, but its turn comes later: it is stopped, and stays so."""
    box = Box({"first": known("first", 20, 2), "sleeper": known("sleeper", 20, 2)}, [card(0, 24, {1: 2})])
    box.runs("sleeper", 0.125, 0.125, state=S.ASLEEP, asleep=True, pids=frozenset({1}))
    box.instances = {**box.instances, "first": Instance("first", S.WAITING, box.now - 400, "1 requests")}
    box.traffic["first"] = TrafficSeen(waiting=1, waiting_since=box.now - 400)
    box.traffic["sleeper"] = TrafficSeen(waiting=1, waiting_since=box.now - 300)
    plan = box.look()
    assert [action.model for action in plan.actions if isinstance(action, Stop)] == ["sleeper"]
    assert states(plan)["sleeper"] is S.STOPPING
