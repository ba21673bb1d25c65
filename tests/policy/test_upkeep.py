"""What a plan asks of engines that live: an idle one gives back once in each idle period, a lost segment is made anew."""

from dataclasses import replace

import pytest

from orchestrator.policy.actions import Action, Repair, SetLimit, Trim
from orchestrator.policy.decide import Plan
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import Segment, TrafficSeen
from orchestrator.policy.units import GIB
from tests.policy.test_decide import BUNDLE, Box, card, known

S = State
TOKEN = 8192  # bytes of KV: 16,384 tokens a bundle


def of(plan: Plan, kind: type[Action]) -> list[Action]:
    return [action for action in plan.actions if isinstance(action, kind)]


def shaped(name: str, **fields: object) -> Known:
    """A model whose KV geometry is known, and its length: 65,536 tokens, 5 bundles."""
    spec = ModelSpec.model_validate({"name": name, "source": f"org/{name}", **fields})
    return Known(spec, Footprint("learned", {}, 20 * GIB, 18 * GIB, 4.5, BUNDLE, TOKEN, 65_536))


# ---- trim -----------------------------------------------------------------------------------------------------------


def test_an_idle_engine_is_trimmed_once_until_it_is_used_again() -> None:
    box = Box({"a": known("a", idle_trim="10s")}, [card(0, 100)])
    box.runs("a", mapped=2, limit=50)
    trims: list[float] = []
    for _ in range(100):
        at = box.now
        trims += [at for _ in of(box.look(), Trim)]
    assert trims == [1010.0]
    box.traffic["a"] = TrafficSeen(last_used=box.now)
    used = box.now
    for _ in range(100):
        at = box.now
        trims += [at for _ in of(box.look(), Trim)]
    assert trims == [1010.0, used + 10.0]


@pytest.mark.parametrize("traffic", [TrafficSeen(in_flight=1, last_used=900.0), TrafficSeen(waiting=1, last_used=900.0)])
def test_nobody_with_requests_is_trimmed(traffic: TrafficSeen) -> None:
    box = Box({"a": known("a", idle_trim="1s")}, [card(0, 100)], {"a": traffic})
    box.runs("a", mapped=2, limit=100)
    assert not [action for _ in range(20) for action in of(box.look(), Trim)]


@pytest.mark.parametrize("state", [S.STARTING, S.DRAINING, S.STOPPING])
def test_only_an_engine_that_serves_is_trimmed(state: State) -> None:
    box = Box({"a": known("a", idle_trim="1s")}, [card(0, 100)], {"a": TrafficSeen(last_used=900.0)})
    box.runs("a", mapped=2, limit=100, state=state, ready=state is not S.STARTING)
    plan = box.look()
    assert of(plan, Trim) == [] or plan.instances["a"].state is S.READY


def test_where_somebody_lacks_memory_the_idle_give_back_at_once() -> None:
    box = Box({"a": known("a", idle_trim="1h"), "b": known("b")}, [card(0, 5)])
    box.runs("a", mapped=60, limit=60)
    box.traffic["a"] = TrafficSeen(last_used=box.now - 0.25)
    box.runs("b", mapped=20, limit=20)
    box.traffic["b"] = TrafficSeen(in_flight=1, last_used=box.now)
    assert of(box.look(), Trim) == []  # idle for 0.25 s: it may be between two requests
    (trim,) = of(box.look(), Trim)
    assert trim == Trim("a", "a", "idle, and others need memory")
    assert of(box.look(), Trim) == []


# ---- repair ---------------------------------------------------------------------------------------------------------


def test_a_lost_segment_is_made_anew_and_the_others_limits_stay() -> None:
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 20)])
    box.runs("a", mapped=20, limit=30)
    box.runs("b", mapped=20, limit=30)
    box.look()
    box.engines["a"] = replace(box.engines["a"], segment=None)
    plan = box.look()
    assert of(plan, Repair) == [Repair("a", "a", "its segment is gone, or is none any more")]
    assert plan.instances["a"].state is S.READY
    assert "a" not in plan.pools
    box.engines["a"] = replace(box.engines["a"], segment=Segment(30 * GIB, 20 * GIB, 0))
    assert of(box.look(), Repair) == []


def test_a_lost_segment_that_was_seen_before_is_made_anew_and_stays_charged() -> None:
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 20)])
    box.runs("a", mapped=20, limit=30)
    box.runs("b", mapped=20, limit=30)
    box.look()
    box.engines["a"] = replace(box.engines["a"], segment_lost=True)
    plan = box.look()
    assert of(plan, Repair) == [Repair("a", "a", "its segment is gone, or is none any more")]
    assert plan.pools["a"].charge_bytes == 30 * GIB
    box.engines["a"] = replace(box.engines["a"], segment_lost=False)
    assert of(box.look(), Repair) == []


@pytest.mark.parametrize(("state", "ready"), [(S.STARTING, False), (S.DRAINING, True), (S.STOPPING, False)])
def test_no_segment_is_made_for_an_engine_that_is_not_serving(state: State, ready: bool) -> None:
    box = Box({"a": known("a")}, [card(0, 100)], {"a": TrafficSeen(in_flight=1)})
    box.runs("a", mapped=0, limit=0, state=state, ready=ready, segment=None)
    plan = box.look()
    assert of(plan, Repair) == [] or plan.instances["a"].state is S.READY


def test_an_engine_whose_segment_says_0_goes_on_with_its_last_limit_and_is_charged_for_it() -> None:
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 20)])
    box.runs("a", mapped=20, limit=40)
    box.runs("b", mapped=20, limit=40)
    for _ in range(8):
        plan = box.look()
        apply(box, plan)
    before = {name: box.engines[name].segment for name in ("a", "b")}
    assert before["a"] is not None
    box.engines["a"] = replace(box.engines["a"], segment=Segment(0, 0, 0))
    plan = box.look()
    assert plan.pools["a"].charge_bytes == before["a"].limit_bytes
    assert [action.limit_bytes > 0 for action in of(plan, SetLimit) if isinstance(action, SetLimit) and action.model == "a"] == [True]
    charged = sum(max(plan.pools[n].charge_bytes, plan.pools[n].limit_bytes) for n in ("a", "b"))
    assert plan.pools["b"].limit_bytes <= before["b"].limit_bytes if before["b"] else False
    assert charged <= 80 * GIB


def apply(box: Box, plan: Plan) -> None:
    for action in of(plan, SetLimit):
        assert isinstance(action, SetLimit)
        seen = box.engines[action.launch_id]
        assert seen.segment is not None
        box.engines[action.launch_id] = replace(seen, segment=replace(seen.segment, limit_bytes=action.limit_bytes))


# ---- what requests need ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "bundles"), [(0, 3), (1, 3), (8192, 3), (16_368, 3), (16_369, 4), (40_000, 5), (65_536, 7), (1 << 30, 7)]
)
def test_the_largest_request_raises_the_floor_for_as_long_as_it_is_there(tokens: int, bundles: int) -> None:
    """By default one request of 8,192 tokens: one bundle, and two to spare."""
    box = Box({"a": shaped("a")}, [card(0, 100)], {"a": TrafficSeen(in_flight=1, last_used=1000.0, largest_tokens=tokens)})
    box.runs("a", mapped=1, limit=100)
    assert box.look().pools["a"].floor_bytes == bundles * BUNDLE
    box.traffic["a"] = TrafficSeen(last_used=box.now)
    assert box.look().pools["a"].floor_bytes == 3 * BUNDLE


def test_those_that_wait_are_demand() -> None:
    box = Box({"a": shaped("a")}, [card(0, 100)], {"a": TrafficSeen(waiting=9, last_used=1000.0, waiting_tokens=900_000)})
    box.runs("a", mapped=1, limit=100)
    busy = box.look().pools["a"].demand_bytes
    assert busy >= GIB + 900_000 * TOKEN
    box.traffic["a"] = TrafficSeen(last_used=box.now)
    assert box.look().pools["a"].demand_bytes <= busy - 900_000 * TOKEN


def test_a_claim_is_told_for_every_engine_that_starts_or_is_promised_memory() -> None:
    box = Box({"a": known("a"), "b": known("b")}, [card(0, 139), card(1, 10)], {"a": TrafficSeen(waiting=1)})
    plan = box.look()
    (launch,) = (i.launch for i in plan.instances.values() if i.launch)
    assert plan.claims == {(launch.spec.name, launch.gpus[0]): 22 * GIB}
    assert plan.gpus[launch.gpus[0]].claims_bytes == 22 * GIB
