"""What people, drivers and other programs get wrong, as the allocator meets it: each has an answer, and says it."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.policy import explain
from orchestrator.policy.actions import SetLimit
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import Segment, TrafficSeen
from orchestrator.policy.units import GIB
from tests.policy.test_decide import Box, card, known
from tests.policy.test_decide_properties import World, look, worlds

# ---- floors that sum to more than the card --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "whole"),
    [
        (150, "abc"),
        (130, "bc"),  # a, the lightest, is left with what is over
        (100, "ac"),  # b's does not fit beside c's; a's does
        (70, "c"),
        (59, "a"),  # neither of the large ones fits
        (25, "a"),
        (10, ""),
    ],
)
def test_floors_that_sum_to_more_than_the_card_are_kept_whole_heaviest_first(room: int, whole: str) -> None:
    """Floors of 20, 60 and 60 GiB with growing priority. Who is left short is told so, and what would help."""
    models = {name: known(name, floor=floor, priority=level) for level, (name, floor) in enumerate((("a", 20), ("b", 60), ("c", 60)))}
    box = Box(models, [card(0, room + 4)])
    for name in models:
        box.runs(name, mapped=0, limit=1)
    for _ in range(4):
        plan = box.look()
        for action in plan.actions:
            if isinstance(action, SetLimit):
                seen = box.engines[action.launch_id]
                box.engines[action.launch_id] = replace(seen, segment=Segment(action.limit_bytes, 0, 0))
    assert sum(pool.limit_bytes for pool in plan.pools.values()) <= room * GIB
    assert "".join(name for name, pool in plan.pools.items() if pool.limit_bytes >= pool.floor_bytes) == whole
    assert {name for name, pool in plan.pools.items() if pool.short} == set(models) - set(whole)
    for name, pool in plan.pools.items():
        assert pool.limit_bytes >= pool.bundle_bytes
        assert ("stop a model, lower a floor, or raise this one's priority" in explain.change(pool)) == (name not in whole)


def test_a_request_that_runs_stands_before_the_spare_room_of_a_heavier_floor() -> None:
    """30 GiB for a floor of 28 with priority, and a request that needs 5 of b."""
    box = Box({"a": known("a", floor=28, priority=3), "b": known("b", floor=2)}, [card(0, 34)])
    box.models["b"] = replace(box.models["b"], footprint=replace(box.models["b"].footprint, kv_token_bytes=8192, max_model_len=1 << 20))
    box.runs("a", mapped=0, limit=1)
    box.runs("b", mapped=0, limit=1)
    box.traffic["b"] = TrafficSeen(in_flight=1, last_used=box.now, largest_tokens=5 * GIB // 8192)
    plan = box.look()
    assert plan.pools["b"].target_bytes >= 5 * GIB
    assert (plan.pools["a"].short, plan.pools["b"].short) == (True, False)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "mend"),
    [
        (0, "greater than 0"),
        (-0.0, "greater than 0"),
        (-1, "greater than 0"),
        (1e9, "less than or equal to 1000"),
        (float("nan"), "finite number"),
        (float("inf"), "finite number"),
        (float("-inf"), "finite number"),
        ("heavy", "valid number"),
        (None, "valid number"),
    ],
)
def test_a_weight_that_divides_nothing_is_refused_with_its_field_its_value_and_the_mend(weight: Any, mend: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelSpec.model_validate({"name": "m", "source": "org/m", "kv_weight": weight})
    (error,) = caught.value.errors()
    assert error["loc"] == ("kv_weight",)
    assert repr(error["input"]) == repr(weight)
    assert mend in error["msg"]


# ---- figures that cannot be -----------------------------------------------------------------------------------------


@st.composite
def nonsense(draw: st.DrawFn) -> World:
    """Any state of the models, with a driver and segments that say anything at all."""
    world: World = draw(worlds())
    number = st.sampled_from((0, -1, -(1 << 63), (1 << 63) - 1, (1 << 64) - 1, 140 * GIB, -5 * GIB))
    seen = world.snapshot
    gpus = {
        uuid: replace(gpu, total_bytes=draw(number), free_bytes=draw(number), processes={pid: draw(number) for pid in gpu.processes})
        for uuid, gpu in seen.gpus.items()
    }
    engines = dict(seen.engines)
    for key, engine in seen.engines.items():
        if engine.segment and draw(st.booleans()):
            engines[key] = replace(engine, segment=Segment(draw(number), draw(number), draw(number)))
    return World(world.known, world.instances, replace(seen, gpus=gpus, engines=engines))


@look
@given(nonsense())
def test_whatever_a_driver_or_a_segment_says_limits_stay_between_a_bundle_and_what_the_engine_can_address(world: World) -> None:
    plan = world.plan()
    launches = {i.launch.id: i.launch for i in plan.instances.values() if i.launch}
    for move in plan.actions:
        if isinstance(move, SetLimit):
            pool, launch = plan.pools[move.launch_id], launches[move.launch_id]
            assert move.limit_bytes % pool.bundle_bytes == 0
            assert pool.bundle_bytes <= move.limit_bytes <= launch.ceiling_bytes
    for uuid, budget in plan.gpus.items():
        assert sum(row.bytes for row in explain.lines(uuid, world.snapshot, plan)) == budget.total_bytes
