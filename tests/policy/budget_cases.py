"""Cases of one look at KV memory, for hypothesis: some GPUs, their pool memory P, and pools with any limit and use.

Also nonsensical ones (limits off the bundle grid, use above the limit, ceilings below the floor, a segment that says 0), because a
restart or another program can leave such things behind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from orchestrator.policy import budgets
from orchestrator.policy.budgets import BudgetPlan, Limit, PoolMemory
from orchestrator.policy.division import Pool
from orchestrator.policy.units import GIB, MIB

TICK_S = 0.25
SETTLED_TICKS = 480  # 120 s: a gap is closed by eighths, and moves that nothing forces are a cool-down (2 s) apart
QUIET_TICKS = 12  # 3 s without a write: longer than the cool-down (2 s) and the settle window (0.5 s)
NOW = 1000.0


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
    busy = draw(st.booleans())
    return Pool(
        launch_id=key,
        model=f"model-{key}",
        gpus=gpus,
        bundle_bytes=bundle,
        floor_bytes=draw(st.integers(0, 30)) * bundle + draw(odd),
        ceiling_bytes=draw(st.integers(1, 150)) * draw(st.sampled_from((1, 1, 1, 10))) * bundle + draw(odd),
        weight=draw(st.sampled_from((0.01, 0.25, 1.0, 1.0, 2.0, 3.0, 256.0))),
        limit_bytes=limit * bundle + draw(odd),
        used_bytes=used * bundle,
        prealloc_bytes=0 if sane and used == limit else draw(st.integers(0, min(10, limit - used) if sane else 10)) * bundle,
        busy=busy,
        idle_s=draw(st.sampled_from((0.0, 1.0, 30.0, 3600.0))),
        live_bytes=draw(st.sampled_from((0, 0, 1, 12 * bundle, 40 * bundle))) if busy else 0,
        queued_bytes=draw(st.sampled_from((0, 0, 5 * bundle, 50 * bundle))) if busy else 0,
    )


@st.composite
def memory_of(draw: st.DrawFn, pool: Pool) -> PoolMemory:
    """What earlier looks may have left: peaks, growth, shrinks young and old, a grow."""
    shrinks = draw(st.lists(st.tuples(st.sampled_from((0.1, 0.3, 0.49, 0.5, 2.0)), st.integers(1, 150)), max_size=2))
    return PoolMemory(
        slow_bytes=float(draw(st.integers(0, 100)) * pool.bundle_bytes),
        used_bytes=pool.used_bytes,
        rate=float(draw(st.sampled_from((0, 0, 1, 30))) * pool.bundle_bytes),
        limit_bytes=pool.limit_bytes or draw(st.integers(0, 120)) * pool.bundle_bytes,
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
        near = Engines(pools, before).may_hold(uuid, NOW) + draw(st.integers(-20, 60)) * 64 * MIB  # where mistakes show: little is left
        amounts[uuid] = near if draw(st.booleans()) else anything
    if unread:
        del amounts[draw(st.sampled_from(uuids))]
    return Case(tuple(pools), amounts, before)


@st.composite
def wide_cases(draw: st.DrawFn) -> Case:
    """A pool over two GPUs, of which one is short, and its neighbours on the other, where it must not hold what it cannot use."""
    wide = draw(pool_on("wide", ("tight", "roomy"), sane=True))
    near = [draw(pool_on(f"near{n}", ("roomy",), sane=True)) for n in range(draw(st.integers(1, 3)))]
    mapped = sum(pool.mapped_bytes for pool in (wide, *near))
    amounts = {
        "tight": draw(st.integers(0, 60)) * wide.bundle_bytes,
        "roomy": mapped + draw(st.integers(-20, 100)) * 64 * MIB,
    }
    return Case((wide, *near), amounts, {})


@st.composite
def calm_cases(draw: st.DrawFn) -> Case:
    """Everybody has what it needs, and the limits fit: whatever moves now, nothing forces it."""
    case: Case = draw(cases(sane=True))
    pools, before = [], {}
    for pool in case.pools:
        half = pool.limit_bytes // pool.bundle_bytes // 2 * pool.bundle_bytes
        used, floor = min(pool.used_bytes, half), min(pool.floor_bytes, half)
        pools.append(replace(pool, used_bytes=used, prealloc_bytes=0, floor_bytes=floor, busy=False, live_bytes=0, queued_bytes=0))
        if memory := case.before.get(pool.launch_id):
            before[pool.launch_id] = replace(memory, slow_bytes=0.0, rate=0.0, replaced=())
    amounts = {}
    for gpu in case.amounts:
        amounts[gpu] = Engines(pools, before).may_hold(gpu, NOW) + draw(st.integers(0, 200)) * 64 * MIB
    case = Case(tuple(pools), amounts, before)
    if draw(st.booleans()):  # nearly where they should be
        target = {key: limit.target_bytes for key, limit in case.plan().limits.items()}
        pools = [
            replace(pool, limit_bytes=max(pool.least, target[pool.launch_id] - short * pool.bundle_bytes))
            for pool in pools
            for short in [draw(st.integers(-1, 20))]
        ]
    return Case(tuple(pools), amounts, before)


class Engines:
    """What engines may still take, said once more from what engines do: half a second passes before a limit is surely obeyed, and
    until then the one before it may be. One whose segment says 0 goes on with the last that it had."""

    def __init__(self, pools: Sequence[Pool], before: Mapping[str, PoolMemory]) -> None:
        self._pools = {pool.launch_id: pool for pool in pools}
        known = {key: before.get(key, PoolMemory()) for key in self._pools}
        self._limit = {key: pool.limit_bytes or known[key].limit_bytes for key, pool in self._pools.items()}
        self._former = {key: list(memory.replaced) for key, memory in known.items()}

    def see(self, pools: Sequence[Pool]) -> None:
        self._pools = {pool.launch_id: pool for pool in pools}

    def obey(self, writes: Sequence[Limit], now: float) -> None:
        for limit in writes:
            self._former[limit.launch_id].append((now, self._limit[limit.launch_id]))
            self._limit[limit.launch_id] = limit.limit_bytes

    def may_hold(self, gpu: str, now: float) -> int:
        total = 0
        for key, pool in self._pools.items():
            if gpu in pool.gpus:
                former = [size for when, size in self._former[key] if now - when < 0.5]
                total += max(self._limit[key], pool.used_bytes + pool.prealloc_bytes, *former, 0)
        return total


def written(pools: Sequence[Pool], plan: BudgetPlan) -> tuple[Pool, ...]:
    """The pools after the writes of the plan."""
    new = {limit.launch_id: limit.limit_bytes for limit in plan.writes}
    return tuple(replace(pool, limit_bytes=new.get(pool.launch_id, pool.limit_bytes)) for pool in pools)


def floor_of(pool: Pool) -> int:
    """Its floor, said once more: what it is promised or its largest request needs, in whole bundles, and no more than its ceiling."""
    bundle = pool.bundle_bytes
    wanted = -(-max(pool.floor_bytes, pool.live_bytes) // bundle) * bundle
    return min(max(wanted, bundle), max(pool.ceiling_bytes // bundle * bundle, bundle))


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
