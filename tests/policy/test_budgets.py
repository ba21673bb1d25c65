"""The parts of the division, one at a time: tables with numbers small enough to check by hand (one bundle is 1)."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.budgets import (
    COOL_DOWN_S,
    IDLE_TAU_S,
    SETTLE_S,
    SLOW_TAU_S,
    BudgetPlan,
    Pool,
    PoolMemory,
    charge,
    demand,
    floors,
    plan,
    remember,
    targets,
    waterfill,
)

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
    ("amount", "needs", "weights", "given_"),
    [
        (30.0, (50, 50, 50), (1, 1, 1), (10, 10, 10)),
        (30.0, (5, 50, 50), (1, 1, 1), (5, 12.5, 12.5)),
        (30.0, (50, 50), (1, 2), (10, 20)),
        (30.0, (3, 50), (1, 2), (3, 27)),
        (99.0, (3, 50), (1, 2), (3, 50)),
        (0.0, (3, 50), (1, 2), (0, 0)),
        (-9.0, (3, 50), (1, 2), (0, 0)),
        (9.0, (), (), ()),
    ],
)
def test_water_filling(amount: float, needs: tuple[float, ...], weights: tuple[float, ...], given_: tuple[float, ...]) -> None:
    answer = waterfill(amount, dict(zip("abc", needs, strict=False)), dict(zip("abc", weights, strict=False)))
    assert list(answer[key] for key in "abc"[: len(needs)]) == pytest.approx(list(given_))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.floats(0, 1e12),
    st.lists(st.tuples(st.floats(0, 1e12), st.floats(0.001, 1000)), min_size=1, max_size=8),
)
def test_water_filling_is_weighted_max_min(amount: float, people: list[tuple[float, float]]) -> None:
    """Nobody over its need, nothing over the amount, nothing left while one needs it, and no one short below another's level."""
    needs, weights = ({str(n): person[i] for n, person in enumerate(people)} for i in (0, 1))
    answer = waterfill(amount, needs, weights)
    close = 1e-6 * max(1.0, amount)
    assert all(0 <= answer[key] <= needs[key] for key in needs)
    assert sum(answer.values()) == pytest.approx(min(amount, sum(needs.values())), abs=close)
    level = max(answer[key] / weights[key] for key in needs)
    for key in needs:
        assert answer[key] >= needs[key] - close or answer[key] / weights[key] >= level * (1 - 1e-6) - close


def test_floors_that_do_not_fit_are_given_whole_heaviest_first() -> None:
    three = [pool("a", floor_bytes=50), pool("b", floor_bytes=40, weight=2.0), pool("c", floor_bytes=30, weight=4.0)]
    assert floors(three, 120) == ({"a": 50, "b": 40, "c": 30}, [])
    assert floors(three, 119) == ({"a": 1, "b": 40, "c": 30}, ["a"])
    assert floors(three, 60) == ({"a": 1, "b": 1, "c": 30}, ["b", "a"])
    assert floors(three, 20) == ({"a": 1, "b": 1, "c": 1}, ["c", "b", "a"])
    assert floors(three, -5) == ({"a": 1, "b": 1, "c": 1}, ["c", "b", "a"])
    assert floors([], 0) == ({}, [])


@pytest.mark.parametrize(
    ("fields", "wanted", "pressure", "shares"),
    [
        (({}, {}), (0, 0), True, (50, 50)),  # all surplus
        (({}, {}), (0, 0), False, (49, 49)),  # 2 % are kept back
        (({}, {"weight": 3.0}), (0, 0), True, (25, 75)),
        (({"floor_bytes": 60}, {}), (0, 0), True, (80, 20)),  # the surplus comes on top
        (({}, {}), (80, 0), True, (90, 10)),
        (({}, {}), (90, 90), True, (50, 50)),
        (({}, {"weight": 3.0}), (90, 90), True, (25, 75)),
        (({"floor_bytes": 40}, {"weight": 3.0}), (90, 90), True, (55, 45)),
        (({"ceiling_bytes": 10}, {}), (0, 0), True, (10, 90)),
        (({"busy": True}, {"idle_s": 1e9}), (0, 0), True, (79, 20)),  # an idle one keeps a quarter of its claim: 80 : 20
    ],
)
def test_targets(fields: tuple[dict[str, Any], ...], wanted: tuple[int, int], pressure: bool, shares: tuple[int, int]) -> None:
    pools = [pool(key, **own) for key, own in zip("ab", fields, strict=True)]
    demands = {p.launch_id: max(p.least, size) for p, size in zip(pools, wanted, strict=True)}
    answer, short = targets(pools, 100, demands, pressure)
    assert [answer["a"], answer["b"]] == pytest.approx(shares, abs=1)
    assert sum(answer.values()) <= 100
    assert short == []


def test_a_pool_loses_its_claim_on_the_surplus_as_it_idles() -> None:
    shares = []
    for idle_s in (0.0, IDLE_TAU_S, 10 * IDLE_TAU_S):
        answer, _ = targets(
            [pool("a", idle_s=idle_s, ceiling_bytes=10_000), pool("b", busy=True, ceiling_bytes=10_000)], 10_000, {"a": 0, "b": 0}, True
        )
        shares.append(answer["a"])
    assert shares == pytest.approx([5000, 3445, 2000], abs=5)


def test_bundles_left_by_rounding_go_to_the_hungry() -> None:
    pools = [pool("a", bundle_bytes=30), pool("b", bundle_bytes=40)]
    answer, _ = targets(pools, 100, {"a": 300, "b": 400}, pressure=True)
    assert answer == {"a": 60, "b": 40}


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
    wide = pool("wide", gpus=("tight", "roomy"), ceiling_bytes=100, busy=True, used_bytes=90, limit_bytes=90)
    near = pool("near", gpus=("roomy",), ceiling_bytes=100, busy=True, used_bytes=90, limit_bytes=90)
    answer = plan([wide, near], {"tight": 20, "roomy": 100}, {}, 0.0)
    assert {key: limit.target_bytes for key, limit in answer.limits.items()} == {"wide": 20, "near": 80}


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
