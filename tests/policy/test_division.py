"""The division of one GPU: tables with numbers small enough to check by hand (one bundle is 1)."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.policy.division import IDLE_TAU_S, Pool, floors, targets, waterfill

BASE = Pool("a", "model-a", ("g",), 1, 0, 1000, 1.0, 100, 0, 0, False, 0.0)


def pool(key: str = "a", **fields: Any) -> Pool:
    return replace(BASE, launch_id=key, model=f"model-{key}", **fields)


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
    answer = waterfill(amount, needs, weights)
    assert list(answer) == pytest.approx(list(given_))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.floats(0, 1e12),
    st.lists(st.tuples(st.floats(0, 1e12), st.floats(0.001, 1000)), min_size=1, max_size=8),
)
def test_water_filling_is_weighted_max_min(amount: float, people: list[tuple[float, float]]) -> None:
    """Nobody over its need, nothing over the amount, nothing left while one needs it, and no one short below another's level."""
    needs, weights = [need for need, _ in people], [weight for _, weight in people]
    answer = waterfill(amount, needs, weights)
    close = 1e-6 * max(1.0, amount)
    assert all(0 <= got <= need for got, need in zip(answer, needs, strict=True))
    assert sum(answer) == pytest.approx(min(amount, sum(needs)), abs=close)
    level = max(got / weight for got, weight in zip(answer, weights, strict=True))
    for got, need, weight in zip(answer, needs, weights, strict=True):
        assert got >= need - close or got / weight >= level * (1 - 1e-6) - close


def test_floors_that_do_not_fit_are_given_whole_heaviest_first() -> None:
    three = [pool("a", floor_bytes=50), pool("b", floor_bytes=40, weight=2.0), pool("c", floor_bytes=30, weight=4.0)]
    assert floors(three, 120) == ([50, 40, 30], [])
    assert floors(three, 119) == ([1, 40, 30], ["a"])
    assert floors(three, 60) == ([1, 1, 30], ["b", "a"])
    assert floors(three, 20) == ([1, 1, 1], ["c", "b", "a"])
    assert floors(three, -5) == ([1, 1, 1], ["c", "b", "a"])
    assert floors([], 0) == ([], [])


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
    demands = [max(p.least, size) for p, size in zip(pools, wanted, strict=True)]
    answer, short = targets(pools, 100, demands, pressure)
    assert answer == pytest.approx(shares, abs=1)
    assert sum(answer) <= 100
    assert short == []


def test_a_pool_loses_its_claim_on_the_surplus_as_it_idles() -> None:
    shares = []
    for idle_s in (0.0, IDLE_TAU_S, 10 * IDLE_TAU_S):
        answer, _ = targets(
            [pool("a", idle_s=idle_s, ceiling_bytes=10_000), pool("b", busy=True, ceiling_bytes=10_000)], 10_000, [0, 0], True
        )
        shares.append(answer[0])
    assert shares == pytest.approx([5000, 3445, 2000], abs=5)


def test_bundles_left_by_rounding_go_to_the_hungry() -> None:
    pools = [pool("a", bundle_bytes=30), pool("b", bundle_bytes=40)]
    answer, _ = targets(pools, 100, [300, 400], pressure=True)
    assert answer == [60, 40]


@pytest.mark.parametrize(
    ("held", "floor", "demands", "shares"),
    [
        (0, 1, [37, 50], [37, 13]),  # nothing is held above a share
        (40, 1, [37, 50], [37, 10]),  # of 50, 40 are still held: the other's limit may not count on the 3 above
        (40, 12, [37, 50], [37, 12]),  # but its floor may
        (60, 1, [37, 50], [37, 1]),
    ],
)
def test_what_a_pool_holds_above_its_share_is_nobody_elses_until_it_leaves(
    held: int, floor: int, demands: list[int], shares: list[int]
) -> None:
    pools = [pool("a", weight=99.0, used_bytes=held, busy=True), pool("b", floor_bytes=floor, busy=True)]
    answer, _ = targets(pools, 50, demands, pressure=True)
    assert answer == shares


@st.composite
def crowds(draw: st.DrawFn) -> list[Pool]:
    """Busy pools that hold nothing yet, with bundles of 1 to 5."""
    weights = st.sampled_from((0.25, 1.0, 1.0, 2.0, 16.0))
    sizes = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(1, 200), weights)
    rows = draw(st.lists(sizes, min_size=1, max_size=5))
    return [
        pool(f"l{at}", bundle_bytes=bundle, floor_bytes=floor, ceiling_bytes=ceiling, weight=weight, busy=True)
        for at, (bundle, floor, ceiling, weight) in enumerate(rows)
    ]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(crowds(), st.integers(0, 400), st.data())
def test_nobody_is_short_of_its_demand_while_a_bundle_of_it_is_left(pools: list[Pool], amount: int, data: st.DataObject) -> None:
    demands = [min(one.most, one.up(data.draw(st.integers(0, 200)))) for one in pools]
    sizes, _ = targets(pools, amount, demands, pressure=True)
    assert sum(sizes) <= max(amount, sum(one.bundle_bytes for one in pools))
    for one, size, wanted in zip(pools, sizes, demands, strict=True):
        assert size >= wanted or amount - sum(sizes) < one.bundle_bytes


@settings(max_examples=100, derandomize=True, deadline=None)
@given(crowds(), st.integers(0, 400), st.booleans())
def test_the_surplus_is_shared_by_weight(pools: list[Pool], amount: int, pressure: bool) -> None:
    """On top of the floors, and but for rounding: nobody that has room left stands lower for its weight than another."""
    base, short = floors(pools, amount)
    assume(not short)
    sizes, _ = targets(pools, amount, base, pressure)
    over = [size - have for size, have in zip(sizes, base, strict=True)]
    for one, size, own in zip(pools, sizes, over, strict=True):
        for other, its in zip(pools, over, strict=True):
            assert size > one.most - one.bundle_bytes or (own + one.bundle_bytes) / one.weight >= its / other.weight


@settings(max_examples=100, derandomize=True, deadline=None)
@given(crowds(), st.integers(0, 400), st.booleans(), st.data())
def test_idling_never_brings_more(pools: list[Pool], amount: int, pressure: bool, data: st.DataObject) -> None:
    """But for rounding: a bundle. With the same demand, so it is the idleness alone."""
    at = data.draw(st.integers(0, len(pools) - 1))
    demands = [min(one.most, one.up(data.draw(st.integers(0, 100)))) for one in pools]
    sizes = []
    for idle_s in (0.0, 10.0, 600.0):
        idle = [replace(one, busy=idle_s == 0, idle_s=idle_s) if number == at else one for number, one in enumerate(pools)]
        sizes.append(targets(idle, amount, demands, pressure)[0][at])
    slack = max(one.bundle_bytes for one in pools)
    assert sizes[2] <= sizes[1] + slack
    assert sizes[1] <= sizes[0] + slack
