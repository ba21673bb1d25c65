"""What must hold for every division of KV memory, whatever the pools are: hypothesis looks for a case where it does not.

A case is one look: some GPUs, their pool memory P, and pools with any limit and use, also nonsensical ones (limits off the
bundle grid, use above the limit, ceilings below the floor), because a restart or another program can leave such things behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from orchestrator.policy import budgets
from orchestrator.policy.budgets import BudgetPlan, PoolMemory
from orchestrator.policy.division import Pool
from orchestrator.policy.units import GIB, MIB

TICK_S = 0.25
SETTLED_TICKS = 480  # 120 s: a gap is closed by eighths, and moves that nothing forces are a cool-down (2 s) apart
QUIET_TICKS = 12  # 3 s without a write: longer than the cool-down (2 s) and the settle window (0.5 s)
NOW = 1000.0

quick = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
slow = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    pools: tuple[Pool, ...]
    amounts: Mapping[str, int]
    before: Mapping[str, PoolMemory]

    def plan(self, now: float = NOW) -> BudgetPlan:
        return budgets.plan(self.pools, self.amounts, self.before, now)

    def here(self, gpu: str) -> list[Pool]:
        return [pool for pool in self.pools if gpu in pool.gpus]


@st.composite
def pool_on(draw: st.DrawFn, key: str, gpus: tuple[str, ...], sane: bool) -> Pool:
    bundle = draw(st.sampled_from((96 * MIB, 112 * MIB, 128 * MIB, 320 * MIB)))
    odd = st.just(0) if sane else st.sampled_from((0, 0, 0, 1, MIB, bundle - 1))
    limit = draw(st.integers(1 if sane else 0, 120))
    used = draw(st.integers(0, limit if sane else 140))
    return Pool(
        launch_id=key,
        model=f"model-{key}",
        gpus=gpus,
        bundle_bytes=bundle,
        floor_bytes=draw(st.integers(0, 30)) * bundle + draw(odd),
        ceiling_bytes=draw(st.integers(1, 150)) * bundle + draw(odd),
        weight=draw(st.sampled_from((0.01, 0.25, 1.0, 1.0, 2.0, 3.0, 256.0))),
        limit_bytes=limit * bundle + draw(odd),
        used_bytes=used * bundle,
        prealloc_bytes=0 if sane and used == limit else draw(st.integers(0, min(10, limit - used) if sane else 10)) * bundle,
        busy=draw(st.booleans()),
        idle_s=draw(st.sampled_from((0.0, 1.0, 30.0, 3600.0))),
    )


@st.composite
def memory_of(draw: st.DrawFn, pool: Pool) -> PoolMemory:
    """What earlier looks may have left: peaks, shrinks young and old, a grow."""
    shrinks = draw(st.lists(st.tuples(st.sampled_from((0.1, 0.3, 0.49, 0.5, 2.0)), st.integers(1, 150)), max_size=2))
    return PoolMemory(
        slow_bytes=float(draw(st.integers(0, 100)) * pool.bundle_bytes),
        at=NOW - TICK_S,
        replaced=tuple((NOW - ago, size * pool.bundle_bytes) for ago, size in shrinks),
        moved_at=draw(st.sampled_from((-1e9, NOW - 0.25, NOW - 1.75, NOW - 2.25))),
    )


@st.composite
def cases(
    draw: st.DrawFn, most_gpus: int = 3, sane: bool = False, remembered: bool = True, tensor_parallel: int = 99, unread: bool = False
) -> Case:
    uuids = [f"GPU-{n}" for n in range(draw(st.integers(1, most_gpus)))]
    pools = []
    for n in range(draw(st.integers(1, 6))):
        wide = len(uuids) > 1 and tensor_parallel > 0 and draw(st.booleans())
        tensor_parallel -= wide
        size = draw(st.integers(2, len(uuids))) if wide else 1
        gpus = draw(st.permutations(uuids))[:size]
        pools.append(draw(pool_on(f"l{n}", tuple(gpus), sane)))
    known = [pool for pool in pools if remembered and draw(st.booleans())]
    before = {pool.launch_id: draw(memory_of(pool)) for pool in known}
    amounts = {}
    for uuid in uuids:
        anything = draw(st.integers(-8 * 64, 48 * 64)) * (GIB // 64)
        near = charged(pools, before, uuid, NOW) + draw(st.integers(-20, 60)) * 64 * MIB  # where mistakes show: little is left over
        amounts[uuid] = near if draw(st.booleans()) else anything
    if unread:
        del amounts[draw(st.sampled_from(uuids))]
    return Case(tuple(pools), amounts, before)


def written(pools: Sequence[Pool], plan: BudgetPlan, count: int | None = None) -> tuple[Pool, ...]:
    """The pools after the first `count` writes of the plan."""
    new = {limit.launch_id: limit.limit_bytes for limit in plan.writes[:count]}
    return tuple(replace(pool, limit_bytes=new.get(pool.launch_id, pool.limit_bytes)) for pool in pools)


def charged(pools: Sequence[Pool], memory: Mapping[str, PoolMemory], gpu: str, now: float) -> int:
    """What the engines on a GPU may hold, said once more from what engines do: half a second passes before a limit is surely obeyed."""
    total = 0
    for pool in pools:
        if gpu in pool.gpus:
            recent = [size for when, size in memory.get(pool.launch_id, PoolMemory()).replaced if now - when < 0.5]
            total += max(pool.limit_bytes, pool.used_bytes + pool.prealloc_bytes, *recent, 0)
    return total


def settle(case: Case) -> tuple[Case, BudgetPlan]:
    """Frozen inputs: write, let time pass, look again, until nothing is written any more. Fails where that does not come."""
    now, quiet = NOW, 0
    for _ in range(SETTLED_TICKS + QUIET_TICKS):
        plan = case.plan(now)
        quiet = 0 if plan.writes else quiet + 1
        if quiet == QUIET_TICKS:
            return case, plan
        case = Case(written(case.pools, plan), case.amounts, plan.memory)
        now += TICK_S
    raise AssertionError(f"still writing after {SETTLED_TICKS} looks: {plan.writes}")


@quick
@given(cases())
def test_a_look_never_promises_more_than_there_is(case: Case) -> None:
    """Nor do the looks after it, which find what it shrank and must not give that out again before it is surely obeyed."""
    for look in range(4):
        now = NOW + look * 0.02
        plan = case.plan(now)
        after = written(case.pools, plan)
        for gpu, amount in case.amounts.items():
            assert charged(after, plan.memory, gpu, now) <= max(amount, charged(case.pools, case.before, gpu, now))
        case = Case(after, case.amounts, plan.memory)


@quick
@given(cases(unread=True))
def test_pools_that_cannot_be_judged_keep_what_they_hold(case: Case) -> None:
    """A pool that spans a GPU without a reading stays as it is, and what it may take is not given to its neighbours."""
    plan = case.plan()
    frozen = {pool.launch_id for pool in case.pools if not all(gpu in case.amounts for gpu in pool.gpus)}
    assert not frozen & {limit.launch_id for limit in plan.writes}
    assert not frozen & plan.limits.keys()
    for gpu, amount in case.amounts.items():
        before = charged(case.pools, case.before, gpu, NOW)
        after = charged(written(case.pools, plan), {**case.before, **plan.memory}, gpu, NOW)
        assert after <= max(amount, before)


@quick
@given(cases(unread=True))
def test_a_shrink_is_remembered_while_its_gpu_cannot_be_read(case: Case) -> None:
    """Else it would be credited too soon when the GPU is back."""
    plan = case.plan()
    for key, memory in case.before.items():
        young = {entry for entry in memory.replaced if NOW - entry[0] < budgets.SETTLE_S}
        assert young <= set(plan.memory[key].replaced)


@quick
@given(cases(), st.data())
def test_any_prefix_of_the_writes_is_safe(case: Case, data: st.DataObject) -> None:
    """A daemon that dies between two writes leaves limits that fit as well as those before."""
    plan = case.plan()
    count = data.draw(st.integers(0, len(plan.writes)))
    for gpu, amount in case.amounts.items():
        after = charged(written(case.pools, plan, count), plan.memory, gpu, NOW)
        assert after <= max(amount, charged(case.pools, case.before, gpu, NOW))


@quick
@given(cases())
def test_shrinks_stand_before_grows(case: Case) -> None:
    grown = [limit.limit_bytes > limit.was_bytes for limit in case.plan().writes]
    assert grown == sorted(grown)


@quick
@given(cases())
def test_limits_are_whole_bundles_between_one_and_the_ceiling(case: Case) -> None:
    plan = case.plan()
    pools = {pool.launch_id: pool for pool in case.pools}
    assert plan.limits.keys() == pools.keys()
    assert len({limit.launch_id for limit in plan.writes}) == len(plan.writes)
    for key, limit in plan.limits.items():
        pool = pools[key]
        assert limit.was_bytes == pool.limit_bytes
        assert (limit in plan.writes) == (limit.limit_bytes != limit.was_bytes)
        for size in (limit.target_bytes, *([limit.limit_bytes] if limit in plan.writes else [])):
            assert size % pool.bundle_bytes == 0
            assert pool.bundle_bytes <= size <= max(pool.bundle_bytes, pool.ceiling_bytes)


@quick
@given(cases())
def test_one_look_after_a_grab_the_limits_fit(case: Case) -> None:
    """Whatever the limits were: what is written fits P, if the floors do."""
    fits = {gpu for gpu, amount in case.amounts.items() if sum(pool.least for pool in case.here(gpu)) <= amount}
    event(f"{len(fits)} of {len(case.amounts)} GPUs fit")
    after = written(case.pools, case.plan())
    for gpu in fits:
        assert sum(pool.limit_bytes for pool in after if gpu in pool.gpus) <= case.amounts[gpu]


@quick
@given(cases(tensor_parallel=0))
def test_what_a_pool_holds_above_its_target_is_not_promised_to_others(case: Case) -> None:
    """Only floors may count on memory that still has to drain: else limits add up, and use goes through the reserve."""
    plan = case.plan()
    for gpu, amount in case.amounts.items():
        here = case.here(gpu)
        heavy = [pool for pool in here if pool.mapped_bytes > plan.limits[pool.launch_id].target_bytes]
        event("heavy" if heavy else "light")
        kept = sum(max(plan.limits[pool.launch_id].target_bytes, pool.mapped_bytes) for pool in here)
        assert kept <= max(amount, sum(max(pool.least, pool.mapped_bytes) for pool in here))


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_pools_and_gpus_does_not_matter(case: Case, random: Random) -> None:
    pools, amounts = list(case.pools), list(case.amounts.items())
    random.shuffle(pools)
    random.shuffle(amounts)
    assert Case(tuple(pools), dict(amounts), case.before).plan() == case.plan()


@quick
@given(cases(), st.data(), st.sampled_from((1.5, 2.0, 16.0)))
def test_more_weight_never_means_less(case: Case, data: st.DataObject, factor: float) -> None:
    """But for rounding: two of the largest bundles."""
    pool = data.draw(st.sampled_from(case.pools))
    heavier = tuple(replace(p, weight=p.weight * factor) if p is pool else p for p in case.pools)
    slack = 2 * max(p.bundle_bytes for p in case.pools)
    light, heavy = case.plan(), Case(heavier, case.amounts, case.before).plan()
    assert heavy.limits[pool.launch_id].target_bytes >= light.limits[pool.launch_id].target_bytes - slack


@slow
@given(cases(remembered=False))
def test_frozen_inputs_come_to_rest(case: Case) -> None:
    settle(case)


@slow
@given(cases(remembered=False, tensor_parallel=1))
def test_nobody_is_hungry_while_memory_lies_idle(case: Case) -> None:
    rest, plan = settle(case)
    left = {gpu: amount - charged(rest.pools, plan.memory, gpu, NOW + 1e6) for gpu, amount in rest.amounts.items()}
    for pool in rest.pools:
        if pool.limit_bytes < budgets.demand(pool, plan.memory[pool.launch_id]):
            event("hungry")
            assert min(left[gpu] for gpu in pool.gpus) < pool.bundle_bytes


@slow
@given(cases(remembered=False))
def test_floors_are_kept_or_still_held_by_those_above_theirs(case: Case) -> None:
    rest, plan = settle(case)
    for pool in rest.pools:
        if not all(sum(p.least for p in rest.here(gpu)) <= rest.amounts[gpu] for gpu in pool.gpus):
            continue
        assert pool.launch_id not in plan.short
        missing = pool.least - pool.limit_bytes
        above = max(sum(max(0, p.mapped_bytes - p.least) for p in rest.here(gpu) if p is not pool) for gpu in pool.gpus)
        event("missing" if missing > 0 else "kept")
        assert missing <= above


@slow
@given(cases(remembered=False, sane=True))
def test_a_floor_that_nobody_stands_on_is_reached_in_one_settle_window(case: Case) -> None:
    """Use below every floor, limits anywhere: two looks and a settle window later each limit is at its floor or above."""
    assume(all(sum(p.least for p in case.here(gpu)) <= amount for gpu, amount in case.amounts.items()))
    idle = tuple(replace(p, used_bytes=0, prealloc_bytes=0) for p in case.pools)
    now = NOW
    case = Case(idle, case.amounts, {})
    while now <= NOW + budgets.SETTLE_S + TICK_S:
        plan = case.plan(now)
        case = Case(written(case.pools, plan), case.amounts, plan.memory)
        now += TICK_S
    assert all(pool.limit_bytes >= pool.least for pool in case.pools)
