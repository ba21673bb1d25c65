"""The parts of a plan, one at a time: tables with numbers small enough to check by hand (one bundle is 1)."""

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.policy.budgets import (
    COOL_DOWN_S,
    SETTLE_S,
    SLOW_TAU_S,
    BudgetPlan,
    PoolMemory,
    charge,
    demand,
    plan,
    remember,
)
from orchestrator.policy.division import Pool

BASE = Pool("a", "model-a", ("g",), 1, 0, 1000, 1.0, 100, 0, 0, False, 0.0)
LONG_AGO = -1e9


def pool(key: str = "a", **fields: Any) -> Pool:
    return replace(BASE, launch_id=key, model=f"model-{key}", **fields)


def look(*pools: Pool, amount: int, now: float = 100.0, **memory: PoolMemory) -> BudgetPlan:
    return plan(pools, {"g": amount}, memory, now)


def new_limits(answer: BudgetPlan) -> dict[str, tuple[int, str]]:
    return {limit.launch_id: (limit.limit_bytes, limit.reason) for limit in answer.writes}


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [
        ({"floor_bytes": 0, "ceiling_bytes": 0}, 10, 10),
        ({"floor_bytes": 11, "ceiling_bytes": 39}, 20, 30),
        ({"floor_bytes": 30, "ceiling_bytes": 30}, 30, 30),
        ({"floor_bytes": 99, "ceiling_bytes": 30}, 30, 30),
    ],
)
def test_bounds_are_whole_bundles(fields: dict[str, Any], least: int, most: int) -> None:
    one = replace(BASE, bundle_bytes=10, **fields)
    assert (one.least, one.most) == (least, most)


@pytest.mark.parametrize(
    ("limit", "used", "prealloc", "replaced", "charged"),
    [
        (100, 20, 5, (), 100),
        (20, 30, 5, (), 35),
        (20, 10, 5, ((99.6, 80),), 80),  # written 0.4 s ago: the engine may not have seen it
        (20, 10, 5, ((99.5, 80),), 20),  # 0.5 s ago: it has
        (20, 10, 5, ((99.6, 40), (99.9, 60)), 60),
        (20, 70, 5, ((99.6, 40),), 75),
    ],
)
def test_the_charge_is_the_most_an_engine_may_still_hold(
    limit: int, used: int, prealloc: int, replaced: tuple[tuple[float, int], ...], charged: int
) -> None:
    assert charge(pool(limit_bytes=limit, used_bytes=used, prealloc_bytes=prealloc), PoolMemory(replaced=replaced), 100.0) == charged


@pytest.mark.parametrize(
    ("fields", "slow", "wanted"),
    [
        ({"used_bytes": 10}, 0.0, 10),  # idle: what it holds
        ({"used_bytes": 10}, 30.5, 31),  # and what it held lately
        ({"used_bytes": 40, "busy": True}, 0.0, 50),  # busy: a quarter more
        ({"used_bytes": 0, "busy": True}, 0.0, 2),  # at least two bundles more
        ({"used_bytes": 40, "busy": True, "limit_bytes": 42}, 0.0, 50),
        ({"used_bytes": 40, "busy": True, "limit_bytes": 41}, 0.0, 80),  # starved: twice as much
        ({"used_bytes": 40, "busy": True}, 60.0, 70),
        ({"used_bytes": 40, "busy": True, "ceiling_bytes": 45}, 0.0, 45),
    ],
)
def test_demand(fields: dict[str, Any], slow: float, wanted: int) -> None:
    assert demand(pool(**fields), PoolMemory(slow_bytes=slow)) == wanted


def test_a_peak_is_forgotten_slowly_and_old_shrinks_at_once() -> None:
    fresh = remember(pool(used_bytes=80), None, 100.0)
    assert (fresh.slow_bytes, fresh.at, fresh.replaced) == (80.0, 100.0, ())
    before = replace(fresh, replaced=((99.9, 7), (95.0, 9)))
    later = remember(pool(used_bytes=10), before, 100.0 + SLOW_TAU_S)
    assert later.slow_bytes == pytest.approx(80 / math.e)
    assert later.replaced == ()
    assert remember(pool(used_bytes=90), before, 100.2).slow_bytes == 90
    assert remember(pool(used_bytes=10), before, 100.2).replaced == ((99.9, 7),)
    assert remember(pool(used_bytes=10), before, 90.0).slow_bytes == 80, "a clock that goes back makes no peak"


@pytest.mark.parametrize(
    ("one", "amount", "moved_ago", "expected"),
    [
        # nothing presses (target: P less the keep of 2 %): an eighth of the gap, not soon after a move, not for little
        (pool(limit_bytes=1000), 1000, 9.0, (998, "it needs less")),
        (pool(limit_bytes=1000, used_bytes=999), 1000, 9.0, None),
        (pool(limit_bytes=1000), 1000, COOL_DOWN_S - 0.1, None),
        (pool(limit_bytes=1000), 1009, 9.0, (999, "it needs less")),
        (pool(limit_bytes=1000), 1012, 9.0, None),
        # pressed: the whole gap at once, cool-down or not
        (pool(limit_bytes=500, ceiling_bytes=500), 400, 0.1, (400, "others need memory")),
        (pool(limit_bytes=500, ceiling_bytes=300), 900, 0.1, (300, "above its ceiling")),
        (pool(limit_bytes=500, floor_bytes=450), 400, 0.1, (400, "floors do not fit")),
        # grows
        (pool(limit_bytes=10, floor_bytes=40, ceiling_bytes=40), 900, 0.1, (40, "up to its floor")),
        (pool(limit_bytes=40, used_bytes=40, busy=True, ceiling_bytes=60), 900, 0.1, (60, "it needs more")),
        (pool(limit_bytes=40), 900, 9.0, (882, "a share of the surplus")),
        (pool(limit_bytes=40), 900, 0.1, None),
        (pool(limit_bytes=993), 1020, 9.0, None),
        (pool(limit_bytes=985), 1020, 9.0, (999, "a share of the surplus")),
    ],
)
def test_one_move(one: Pool, amount: int, moved_ago: float, expected: tuple[int, str] | None) -> None:
    """A look at one pool; its limit before, P, how long ago it moved -> the limit written, and why."""
    answer = look(one, amount=amount, a=PoolMemory(at=100.0, moved_at=100.0 - moved_ago))
    assert new_limits(answer) == ({"a": expected} if expected else {})


def test_a_shrink_is_credited_when_use_is_seen_below_it_and_half_a_second_has_passed() -> None:
    """`b` starves for what `a` is made to give back: it gets it at the first look after both."""
    pools = {"a": pool("a", limit_bytes=90), "b": pool("b", limit_bytes=10, used_bytes=10, busy=True, floor_bytes=50)}
    memory: dict[str, PoolMemory] = {}
    got = []
    for tick, use in enumerate((90, 90, 90, 20, 20)):
        pools["a"] = replace(pools["a"], used_bytes=use, floor_bytes=20)
        answer = look(*pools.values(), amount=100, now=100 + tick * 0.25, **memory)
        memory = dict(answer.memory)
        pools = {key: replace(one, limit_bytes=answer.limits[key].limit_bytes) for key, one in pools.items()}
        got.append(pools["b"].limit_bytes)
    assert got[:3] == [10, 10, 10]
    assert got[3] >= 50
    assert SETTLE_S == 0.5


def test_a_zeroed_segments_former_limit_is_charged_until_its_engine_has_surely_seen_the_new_one() -> None:
    """`a` had 85; where its segment says 0 it goes on with that, also for half a second after 25 was written there."""
    pools = {"a": pool("a", limit_bytes=0), "b": pool("b", limit_bytes=10, used_bytes=10, busy=True, floor_bytes=50)}
    memory = {"a": PoolMemory(limit_bytes=85, at=99.75)}
    got = []
    for now in (100.0, 100.02, 100.49, 100.5):
        answer = look(*pools.values(), amount=100, now=now, **memory)
        memory = dict(answer.memory)
        pools = {key: replace(one, limit_bytes=answer.limits[key].limit_bytes) for key, one in pools.items()}
        got.append((answer.charges["a"], pools["a"].limit_bytes, pools["b"].limit_bytes))
    assert got == [(85, 25, 15), (85, 25, 15), (85, 25, 15), (25, 25, 74)]


def test_those_below_their_floor_are_served_first_then_the_hungriest() -> None:
    pools = [
        pool("a", limit_bytes=5, used_bytes=5, busy=True, weight=100.0),
        pool("b", limit_bytes=5, floor_bytes=20, ceiling_bytes=20),
        pool("c", limit_bytes=5, used_bytes=5, busy=True, weight=0.01),
    ]
    grows = [limit.launch_id for limit in look(*pools, amount=36).writes]
    assert grows == ["b", "a", "c"]


def test_a_gpu_with_no_pools_and_pools_with_no_gpu_are_nothing() -> None:
    nobody = plan([], {"g": 100}, {}, 0.0)
    assert (nobody.limits, nobody.writes, nobody.memory, nobody.short) == ({}, (), {}, ())
    lonely = plan([pool()], {}, {}, 0.0)
    assert (lonely.limits, lonely.writes, lonely.short) == ({}, (), ())


def test_what_is_remembered_of_a_pool_that_is_gone_is_forgotten() -> None:
    assert look(pool("a"), amount=900, b=PoolMemory()).memory.keys() == {"a"}


def test_tensor_parallel_takes_the_smallest_share_and_leaves_the_rest_to_the_others() -> None:
    """`wide` gets 20 of the tight GPU; `near`, on the roomy one, gets all that `wide` can not use there."""
    wide = pool("wide", gpus=("tight", "roomy"), ceiling_bytes=100, busy=True, queued_bytes=90, limit_bytes=90)
    near = pool("near", gpus=("roomy",), ceiling_bytes=100, busy=True, queued_bytes=90, limit_bytes=90)
    answer = plan([wide, near], {"tight": 20, "roomy": 100}, {}, 0.0)
    assert {key: limit.target_bytes for key, limit in answer.limits.items()} == {"wide": 20, "near": 80}
    holding = replace(wide, used_bytes=90)
    answer = plan([holding, near], {"tight": 20, "roomy": 100}, {}, 0.0)
    assert answer.limits["near"].target_bytes == 10, "what it still holds there can not be used yet"


def test_a_floor_that_fits_once_a_wide_pool_steps_back_is_not_called_short() -> None:
    """On `roomy` the floors do not both fit, but `wide` can not have its floor on `tight` anyway."""
    wide = pool("wide", gpus=("tight", "roomy"), floor_bytes=80, weight=2.0)
    near = pool("near", gpus=("roomy",), floor_bytes=80)
    answer = plan([wide, near], {"tight": 20, "roomy": 100}, {}, 0.0)
    assert answer.short == ("wide",)
    assert answer.limits["near"].target_bytes == 80


@pytest.mark.parametrize("reason", ["it needs more", "what the engine started with"])
def test_a_limit_that_stays_keeps_the_reason_it_was_given(reason: str) -> None:
    answer = look(pool(limit_bytes=1000), amount=5000, a=PoolMemory(at=100.0, moved_at=LONG_AGO, reason=reason))
    assert answer.writes == ()
    assert answer.limits["a"].reason == reason
