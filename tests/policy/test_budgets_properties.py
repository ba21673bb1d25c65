"""What must hold for every division of KV memory, whatever the pools are: hypothesis looks for a case where it does not.

`make planted` shows what these are worth: each rule of the allocator that is broken must break one of them.
"""

from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from orchestrator.policy import budgets
from orchestrator.policy.budgets import PoolMemory
from orchestrator.policy.division import Pool, floors
from orchestrator.policy.units import MIB
from tests.policy.budget_cases import NOW, TICK_S, Case, Engines, calm_cases, cases, floor_of, settle, wide_cases, written

quick = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
slow = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---- never more than there is ---------------------------------------------------------------------------------------


@quick
@given(cases(), st.data())
def test_a_look_never_promises_more_than_there_is(case: Case, data: st.DataObject) -> None:
    """Nor do the looks after it, which find what it shrank and must not give that out again before it is surely obeyed.

    Between looks: P moves, use moves within what an engine may hold, segments are zeroed.
    """
    now, engines = NOW, Engines(case.pools, case.before)
    for _ in range(5):
        case = looked(case, engines, now)
        now += data.draw(st.sampled_from((0.02, 0.1, 0.25)))
        pools = tuple(data.draw(changed(pool)) for pool in case.pools)
        engines.see(pools)
        case = Case(pools, {gpu: data.draw(moved(amount, engines.may_hold(gpu, now))) for gpu, amount in case.amounts.items()}, case.before)


@quick
@given(cases(most_gpus=1, sane=True), st.data())
def test_an_engine_with_a_zeroed_segment_is_charged_for_its_last_limit_until_it_has_surely_seen_another(
    case: Case, data: st.DataObject
) -> None:
    """All others starve at the same time, so whatever is credited too soon is given out, and a look comes every 20 ms."""
    engines = Engines(case.pools, case.before)
    case = looked(case, engines, NOW)
    zeroed = data.draw(st.integers(0, len(case.pools) - 1))
    pools = tuple(
        replace(pool, limit_bytes=0) if at == zeroed else replace(pool, used_bytes=pool.limit_bytes, busy=True)
        for at, pool in enumerate(case.pools)
    )
    engines.see(pools)
    case = Case(pools, {gpu: engines.may_hold(gpu, NOW) for gpu in case.amounts}, case.before)
    for look in range(4):
        case = looked(case, engines, NOW + TICK_S + look * 0.02)


def looked(case: Case, engines: Engines, now: float) -> Case:
    """After one look, which did not promise more than there is."""
    plan = case.plan(now)
    before = {gpu: engines.may_hold(gpu, now) for gpu in case.amounts}
    engines.obey(plan.writes, now)
    for gpu, amount in case.amounts.items():
        assert engines.may_hold(gpu, now) <= max(amount, before[gpu])
    return Case(written(case.pools, plan), case.amounts, plan.memory)


def moved(amount: int, held: int) -> st.SearchStrategy[int]:
    return st.sampled_from((amount, held - 900 * MIB, held - 100 * MIB, held, held + 100 * MIB, held + 900 * MIB))


def changed(pool: Pool) -> st.SearchStrategy[Pool]:
    """What may be seen of it a moment later."""
    zeroed, starved = replace(pool, limit_bytes=0), replace(pool, used_bytes=max(pool.used_bytes, pool.limit_bytes), busy=True)
    return st.sampled_from((pool, zeroed, starved, replace(pool, used_bytes=0)))


@quick
@given(cases(unread=True))
def test_pools_that_cannot_be_judged_keep_what_they_hold(case: Case) -> None:
    """A pool that spans a GPU without a reading stays as it is, and what it may take is not given to its neighbours."""
    plan, engines = case.plan(), Engines(case.pools, case.before)
    frozen = {pool.launch_id for pool in case.pools if not all(gpu in case.amounts for gpu in pool.gpus)}
    assert not frozen & {limit.launch_id for limit in plan.writes}
    assert not frozen & plan.limits.keys()
    before = {gpu: engines.may_hold(gpu, NOW) for gpu in case.amounts}
    engines.obey(plan.writes, NOW)
    for gpu, amount in case.amounts.items():
        assert engines.may_hold(gpu, NOW) <= max(amount, before[gpu])


@quick
@given(cases(unread=True) | wide_cases().map(lambda case: without(case, "tight")))
def test_neighbours_of_a_pool_that_cannot_be_judged_are_planned_without_its_memory(case: Case) -> None:
    """Beside what it may take their targets fit, if their floors do, and so do their limits after one look, whatever they were."""
    plan = case.plan()
    for gpu, amount in case.amounts.items():
        judged = [pool for pool in case.here(gpu) if pool.launch_id in plan.limits]
        others = [pool for pool in case.here(gpu) if pool.launch_id not in plan.limits]
        room = amount - sum(plan.charges[pool.launch_id] for pool in others)
        if judged and sum(floor_of(pool) for pool in judged) <= room:
            event("beside one that cannot be judged" if others else "all judged")
            assert sum(plan.limits[pool.launch_id].target_bytes for pool in judged) <= room
            assert sum(plan.limits[pool.launch_id].limit_bytes for pool in judged) <= room


def without(case: Case, gpu: str) -> Case:
    """While that GPU cannot be read."""
    return replace(case, amounts={uuid: amount for uuid, amount in case.amounts.items() if uuid != gpu})


@quick
@given(cases(unread=True))
def test_a_pool_is_remembered_while_its_gpu_cannot_be_read(case: Case) -> None:
    """Else its shrinks would be credited too soon when the GPU is back, and its peak would be lost."""
    plan = case.plan()
    assert plan.memory.keys() == {pool.launch_id for pool in case.pools}
    for key, memory in case.before.items():
        young = {entry for entry in memory.replaced if NOW - entry[0] < 0.5}
        assert young <= set(plan.memory[key].replaced)


@quick
@given(cases(), st.data())
def test_any_prefix_of_the_writes_is_safe(case: Case, data: st.DataObject) -> None:
    """A daemon that dies between two writes leaves limits that fit as well as those before."""
    plan, engines = case.plan(), Engines(case.pools, case.before)
    before = {gpu: engines.may_hold(gpu, NOW) for gpu in case.amounts}
    engines.obey(plan.writes[: data.draw(st.integers(0, len(plan.writes)))], NOW)
    for gpu, amount in case.amounts.items():
        assert engines.may_hold(gpu, NOW) <= max(amount, before[gpu])


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
    fits = {gpu for gpu, amount in case.amounts.items() if sum(floor_of(pool) for pool in case.here(gpu)) <= amount}
    event(f"{len(fits)} of {len(case.amounts)} GPUs fit")
    after = written(case.pools, case.plan())
    for gpu in fits:
        assert sum(pool.limit_bytes for pool in after if gpu in pool.gpus) <= case.amounts[gpu]


@quick
@given(cases() | wide_cases())
def test_what_a_pool_holds_above_its_target_is_not_promised_to_others(case: Case) -> None:
    """Only floors may count on memory that still has to drain: else limits add up, and use goes through the reserve."""
    plan = case.plan()
    for gpu, amount in case.amounts.items():
        here = case.here(gpu)
        heavy = [pool for pool in here if pool.mapped_bytes > plan.limits[pool.launch_id].target_bytes]
        event("heavy" if heavy else "light")
        kept = sum(max(plan.limits[pool.launch_id].target_bytes, pool.mapped_bytes) for pool in here)
        assert kept <= max(amount, sum(max(floor_of(pool), pool.mapped_bytes) for pool in here))


# ---- who gets it ----------------------------------------------------------------------------------------------------


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


@quick
@given(cases(most_gpus=1), st.floats(0, 1.1))
def test_floors_that_do_not_fit_keep_requests_running_first_and_then_the_heaviest(case: Case, share: float) -> None:
    """A bundle each; what running requests need to end; whole floors. Within these by weight, and each whole or not at all."""
    amount = int(share * sum(map(floor_of, case.pools)))
    given_, short = floors(case.pools, amount)
    assert short == [p.launch_id for p in _heaviest_first(case) if given_[case.pools.index(p)] < floor_of(p)]
    if sum(map(floor_of, case.pools)) <= amount:
        assert given_ == [floor_of(pool) for pool in case.pools]
        return
    alive = [min(floor_of(replace(pool, floor_bytes=0)), floor_of(pool)) for pool in case.pools]
    assert sum(given_) <= max(amount, sum(pool.bundle_bytes for pool in case.pools))
    assert all(got in (p.bundle_bytes, need, floor_of(p)) for got, need, p in zip(given_, alive, case.pools, strict=True))
    event("requests fit" if sum(alive) <= amount else "requests do not fit")
    assert sum(alive) > amount or all(got >= need for got, need in zip(given_, alive, strict=True))
    first = _heaviest_first(case)[0]
    at = case.pools.index(first)
    others = sum(need for pool, need in zip(case.pools, alive, strict=True) if pool is not first)
    assert given_[at] == floor_of(first) or floor_of(first) + others > amount


@quick
@given(cases(most_gpus=1), st.data(), st.floats(0, 1))
def test_what_running_requests_need_stands_before_the_rest_of_any_floor(case: Case, data: st.DataObject, share: float) -> None:
    """Whatever the weights: where that much fits, each has what its largest request needs to end."""
    pools = tuple(replace(p, live_bytes=int(p.floor_bytes * data.draw(st.sampled_from((0, 0.3, 0.9, 1.2))))) for p in case.pools)
    alive = [floor_of(replace(pool, floor_bytes=0)) for pool in pools]
    whole = sum(map(floor_of, pools))
    given_, _ = floors(pools, sum(alive) + int(share * (whole - sum(alive))))
    event("whole floors fit" if sum(given_) == whole else "they do not")
    assert all(got >= need for got, need in zip(given_, alive, strict=True))


def _heaviest_first(case: Case) -> list[Pool]:
    return sorted(case.pools, key=lambda pool: (-pool.weight, pool.launch_id))


@quick
@given(cases())
def test_who_lacks_memory_gets_at_once_what_nobody_may_take(case: Case) -> None:
    """Below its floor or its demand no cool-down counts: after the look it is where it should be, or no bundle is left."""
    plan, engines = case.plan(), Engines(case.pools, case.before)
    engines.obey(plan.writes, NOW)
    for pool in case.pools:
        limit = plan.limits[pool.launch_id]
        if pool.limit_bytes < max(floor_of(pool), plan.demands[pool.launch_id]) and limit.limit_bytes < limit.target_bytes:
            event("still short")
            assert min(case.amounts[gpu] - engines.may_hold(gpu, NOW) for gpu in pool.gpus) < pool.bundle_bytes


@quick
@given(cases())
def test_floors_are_served_before_anybody_else_grows(case: Case) -> None:
    plan = case.plan()
    floor = {pool.launch_id: floor_of(pool) for pool in case.pools}
    below = [limit.was_bytes < floor[limit.launch_id] for limit in plan.writes if limit.limit_bytes > limit.was_bytes]
    event(f"{len(set(below))} kinds of grows")
    assert below == sorted(below, reverse=True)


@quick
@given(calm_cases())
def test_where_nothing_presses_a_part_is_kept_in_hand(case: Case) -> None:
    """2 % of P: a burst grows into it at the next look, without waiting for anybody's shrink."""
    case = replace(case, pools=tuple(replace(pool, gpus=pool.gpus[:1]) for pool in case.pools))
    plan = case.plan()
    for gpu, amount in case.amounts.items():
        if gpu not in plan.pressed:
            needed = sum(max(floor_of(pool), plan.demands[pool.launch_id]) for pool in case.here(gpu))
            targets = sum(plan.limits[pool.launch_id].target_bytes for pool in case.here(gpu))
            event("calm")
            assert targets <= max(0.98 * amount, needed)


# ---- when it moves --------------------------------------------------------------------------------------------------


@settings(quick, max_examples=120)
@given(calm_cases())
def test_moves_that_nothing_forces_are_rare_and_gentle(case: Case) -> None:
    """Two seconds apart, not for a hundredth of the ceiling, and down by an eighth of the way: a limit is never below its demand."""
    plan = case.plan()
    pools = {pool.launch_id: pool for pool in case.pools}
    for limit in plan.writes:
        pool = pools[limit.launch_id]
        lacked = pool.limit_bytes < max(floor_of(pool), plan.demands[pool.launch_id])
        if lacked or pool.limit_bytes > pool.ceiling_bytes or (limit.limit_bytes < limit.was_bytes and plan.pressed & set(pool.gpus)):
            event("forced")
            continue
        gap = abs(limit.target_bytes - limit.was_bytes)
        event("of itself")
        assert NOW - case.before.get(pool.launch_id, PoolMemory()).moved_at >= 2.0
        assert gap >= pool.bundle_bytes
        if limit.limit_bytes < limit.was_bytes:
            assert gap >= 0.01 * pool.ceiling_bytes - pool.bundle_bytes
            assert limit.was_bytes - limit.limit_bytes < max(gap / 8, pool.bundle_bytes) + pool.bundle_bytes
            assert limit.limit_bytes >= min(plan.demands[pool.launch_id], limit.was_bytes // pool.bundle_bytes * pool.bundle_bytes)
        else:
            assert limit.limit_bytes - limit.was_bytes >= 0.01 * (pool.ceiling_bytes - pool.bundle_bytes)


@slow
@given(cases(remembered=False))
def test_frozen_inputs_come_to_rest(case: Case) -> None:
    settle(case)


@slow
@given(cases(remembered=False, tensor_parallel=1))
def test_nobody_is_hungry_while_memory_lies_idle(case: Case) -> None:
    rest, plan = settle(case)
    left = {gpu: amount - Engines(rest.pools, {}).may_hold(gpu, NOW) for gpu, amount in rest.amounts.items()}
    for pool in rest.pools:
        if pool.limit_bytes < budgets.demand(pool, plan.memory[pool.launch_id]):
            event("hungry")
            assert min(left[gpu] for gpu in pool.gpus) < pool.bundle_bytes


@quick
@given(wide_cases())
def test_what_a_wide_pool_can_not_use_goes_to_its_neighbours(case: Case) -> None:
    """None of them that could grow is short of its demand while a bundle of it is neither promised nor still held."""
    plan = case.plan()
    near = [pool for pool in case.pools if len(pool.gpus) == 1]
    kept = sum(max(plan.limits[pool.launch_id].target_bytes, pool.mapped_bytes) for pool in case.here("roomy"))
    for pool in near:
        if pool.mapped_bytes <= plan.limits[pool.launch_id].target_bytes < plan.demands[pool.launch_id]:
            event("short of its demand")
            assert case.amounts["roomy"] - kept < pool.bundle_bytes


@slow
@given(cases(remembered=False))
def test_floors_are_kept_or_still_held_by_those_above_theirs(case: Case) -> None:
    rest, plan = settle(case)
    for pool in rest.pools:
        if not all(sum(floor_of(p) for p in rest.here(gpu)) <= rest.amounts[gpu] for gpu in pool.gpus):
            continue
        assert pool.launch_id not in plan.short
        missing = floor_of(pool) - pool.limit_bytes
        above = max(sum(max(0, p.mapped_bytes - floor_of(p)) for p in rest.here(gpu) if p is not pool) for gpu in pool.gpus)
        event("missing" if missing > 0 else "kept")
        assert missing <= above


@slow
@given(cases(remembered=False, sane=True))
def test_a_floor_that_nobody_stands_on_is_reached_in_one_settle_window(case: Case) -> None:
    """Use below every floor, limits anywhere: two looks and a settle window later each limit is at its floor or above."""
    assume(all(sum(floor_of(p) for p in case.here(gpu)) <= amount for gpu, amount in case.amounts.items()))
    idle = tuple(replace(p, used_bytes=0, prealloc_bytes=0) for p in case.pools)
    now = NOW
    case = Case(idle, case.amounts, {})
    while now <= NOW + 0.5 + TICK_S:
        plan = case.plan(now)
        case = Case(written(case.pools, plan), case.amounts, plan.memory)
        now += TICK_S
    assert all(pool.limit_bytes >= floor_of(pool) for pool in case.pools)
