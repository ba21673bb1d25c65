"""Divide each GPU's KV memory: floors, then demand, then the surplus; shrink at once, grow only into memory that is seen.

The rule that keeps it right: what every engine may still take (`charge`) never sums to more than what exists (P), for any
prefix of the writes. An engine obeys a smaller limit only at its next allocation, so a shrink is credited when use is seen
to be below it, and never within SETTLE_S of the write.

Three tiers of weighted max-min (water filling): cgroups' memory.min and memory.low in spirit, the idle tax from VMware ESX.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

SETTLE_S = 0.5  # an engine's watcher polls every 0.1 s; a shrink is not credited sooner than this after the write
COOL_DOWN_S = 2.0  # between two moves of a pool that nothing forces: the loop may look fifty times in that time
SLOW_TAU_S = 5.0  # how fast a past peak of use is forgotten
IDLE_TAU_S = 30.0  # how fast an idle pool loses its claim on the surplus
IDLE_TAX = 0.75  # how much of that claim it loses
KEEP = 0.02  # of P, kept out of the surplus: a burst grows into it at once, without a shrink first
DEAD_BAND = 0.01  # of the ceiling: smaller moves are not worth a write


@dataclass(frozen=True, slots=True)
class Pool:
    """One engine's KV memory as it is now. Bytes per GPU: with tensor parallelism the same on each of `gpus`."""

    launch_id: str
    model: str
    gpus: tuple[str, ...]
    bundle_bytes: int
    floor_bytes: int
    ceiling_bytes: int
    weight: float
    limit_bytes: int
    used_bytes: int
    prealloc_bytes: int
    busy: bool
    idle_s: float

    @property
    def mapped_bytes(self) -> int:
        return self.used_bytes + self.prealloc_bytes

    def down(self, size: float) -> int:
        return math.floor(size / self.bundle_bytes) * self.bundle_bytes

    def up(self, size: float) -> int:
        return math.ceil(size / self.bundle_bytes) * self.bundle_bytes

    @property
    def most(self) -> int:
        return max(self.bundle_bytes, self.down(self.ceiling_bytes))

    @property
    def least(self) -> int:
        return min(max(self.up(self.floor_bytes), self.bundle_bytes), self.most)


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What must be remembered of a pool between two looks."""

    slow_bytes: float = 0.0  # use, falling slowly after a peak
    at: float = 0.0
    replaced: tuple[tuple[float, int], ...] = ()  # (when, the larger limit that a shrink replaced)
    moved_at: float = -1e9
    reason: str = "what the engine started with"  # why its limit is what it is


@dataclass(frozen=True, slots=True)
class Limit:
    launch_id: str
    model: str
    limit_bytes: int
    was_bytes: int
    target_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """`limits` has one entry a pool, also where nothing changes; `writes` those to be written, in this order."""

    limits: Mapping[str, Limit]
    writes: tuple[Limit, ...]
    memory: Mapping[str, PoolMemory]
    short: tuple[str, ...]  # launches whose floor does not fit


def charge(pool: Pool, memory: PoolMemory, now: float) -> int:
    """The most that this engine may still hold before it has surely seen its limit."""
    recent = [size for when, size in memory.replaced if now - when < SETTLE_S]
    return max(pool.limit_bytes, pool.mapped_bytes, *recent, 0)


def demand(pool: Pool, memory: PoolMemory) -> int:
    """What it could use now: its use, a recent peak, and room to grow for as long as it is busy."""
    size = max(float(pool.used_bytes), memory.slow_bytes)
    if pool.busy:
        starved = pool.used_bytes + 2 * pool.bundle_bytes > pool.limit_bytes
        size += max(2.0 * pool.bundle_bytes, pool.used_bytes if starved else pool.used_bytes / 4)
    return min(pool.up(size), pool.most)


def remember(pool: Pool, before: PoolMemory | None, now: float) -> PoolMemory:
    if before is None:
        return PoolMemory(slow_bytes=float(pool.used_bytes), at=now)
    faded = before.slow_bytes * math.exp(-max(0.0, now - before.at) / SLOW_TAU_S)
    kept = tuple((when, size) for when, size in before.replaced if now - when < SETTLE_S)
    return replace(before, slow_bytes=max(float(pool.used_bytes), faded), at=now, replaced=kept)


def waterfill(amount: float, needs: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weighted max-min: nobody gets more than its need; what one does not need goes to the others by weight. O(n log n)."""
    given: dict[str, float] = {}
    left, weight = max(0.0, amount), sum(weights[key] for key in needs)
    for key in sorted(needs, key=lambda k: (needs[k] / weights[k], k)):
        given[key] = max(0.0, min(needs[key], left * weights[key] / weight)) if weight > 0 else 0.0
        left -= given[key]
        weight -= weights[key]
    return given


def floors(pools: Sequence[Pool], amount: int) -> tuple[dict[str, int], list[str]]:
    """Each pool's floor; where they do not all fit, one bundle each, then whole floors by weight, heaviest first."""
    if sum(pool.least for pool in pools) <= amount:
        return {pool.launch_id: pool.least for pool in pools}, []
    given = {pool.launch_id: pool.bundle_bytes for pool in pools}
    left, short = amount - sum(given.values()), []
    for pool in sorted(pools, key=lambda p: (-p.weight, p.launch_id)):
        more = pool.least - pool.bundle_bytes
        if more <= left:
            given[pool.launch_id] += more
            left -= more
        else:
            short.append(pool.launch_id)
    return given, short


def targets(pools: Sequence[Pool], amount: int, demands: Mapping[str, int], pressure: bool) -> tuple[dict[str, int], list[str]]:
    """Where each pool of one GPU should be, in whole bundles between its floor and its ceiling, within `amount`."""
    base, short = floors(pools, amount)
    room = max(0.0, float(amount - sum(base.values())))
    weights = {p.launch_id: p.weight for p in pools}
    wanted = {p.launch_id: float(max(0, demands[p.launch_id] - base[p.launch_id])) for p in pools}
    by_demand = waterfill(room, wanted, weights)
    room -= sum(by_demand.values())
    surplus = room if pressure else room - KEEP * amount
    taxed = {p.launch_id: p.weight * (1 - IDLE_TAX * (1 - (1.0 if p.busy else math.exp(-p.idle_s / IDLE_TAU_S)))) for p in pools}
    head = {p.launch_id: max(0.0, p.most - base[p.launch_id] - by_demand[p.launch_id]) for p in pools}
    by_weight = waterfill(surplus, head, taxed)
    result = {}
    for pool in pools:
        key = pool.launch_id
        result[key] = min(pool.most, max(base[key], pool.down(base[key] + by_demand[key] + by_weight[key])))
    if pressure:  # rounding left bundles over: nobody may be hungry while they lie there
        left = amount - sum(result.values())
        for pool in sorted(pools, key=lambda p: (-(demands[p.launch_id] - result[p.launch_id]) / p.weight, p.launch_id)):
            while result[pool.launch_id] < demands[pool.launch_id] and pool.bundle_bytes <= left and result[pool.launch_id] < pool.most:
                result[pool.launch_id] += pool.bundle_bytes
                left -= pool.bundle_bytes
    return result, short


def plan(pools: Sequence[Pool], amounts: Mapping[str, int], before: Mapping[str, PoolMemory], now: float) -> BudgetPlan:
    """Limits for all pools over all GPUs. `amounts`: pool memory P per GPU uuid; pools on a GPU without one are left as they are.

    Same input, same output; the order of `pools` does not matter.
    """
    known = sorted((p for p in pools if all(gpu in amounts for gpu in p.gpus)), key=lambda p: p.launch_id)
    frozen = [p for p in pools if not all(gpu in amounts for gpu in p.gpus)]
    memory = {p.launch_id: remember(p, before.get(p.launch_id), now) for p in pools}
    charges = {p.launch_id: charge(p, memory[p.launch_id], now) for p in pools}
    demands = {p.launch_id: demand(p, memory[p.launch_id]) for p in known}

    target: dict[str, int] = {}
    rooms: dict[str, int] = {}
    left: dict[str, int] = {}
    pressed: set[str] = set()
    short: set[str] = set()
    for gpu, amount in amounts.items():
        here = [p for p in known if gpu in p.gpus]
        amount -= sum(charges[p.launch_id] for p in frozen if gpu in p.gpus)  # it spans a GPU that cannot be read: not to be given away
        rooms[gpu] = amount
        left[gpu] = amount - sum(charges[p.launch_id] for p in here)
        if left[gpu] < 0 or any(p.limit_bytes < max(p.least, demands[p.launch_id]) for p in here):
            pressed.add(gpu)
        wanted, lacking = targets(here, amount, demands, gpu in pressed)
        short.update(lacking)
        for key, size in wanted.items():  # tensor parallel: the smallest share over its GPUs
            target[key] = min(size, target.get(key, size))
    for gpu, amount in rooms.items():  # what a pool leaves here, because another of its GPUs is tighter, goes to the others
        if spanning := [p for p in known if gpu in p.gpus and len(p.gpus) > 1]:
            others = [p for p in known if p.gpus == (gpu,)]
            again, lacking = targets(others, amount - sum(target[p.launch_id] for p in spanning), demands, gpu in pressed)
            target.update(again)
            short = (short - again.keys()) | set(lacking)

    limits = {
        p.launch_id: Limit(p.launch_id, p.model, p.limit_bytes, p.limit_bytes, target[p.launch_id], memory[p.launch_id].reason)
        for p in known
    }
    shrinks: list[Limit] = []
    for pool in known:
        key, under_pressure = pool.launch_id, any(gpu in pressed for gpu in pool.gpus)
        new = _shrink(pool, memory[key], target[key], demands[key], under_pressure, now)
        if new < pool.limit_bytes:
            if pool.limit_bytes > pool.most:
                reason = "above its ceiling"
            elif key in short:
                reason = "floors do not fit"
            else:
                reason = "others need memory" if under_pressure else "it needs less"
            limits[key] = replace(limits[key], limit_bytes=new, reason=reason)
            shrinks.append(limits[key])
            memory[key] = replace(memory[key], replaced=(*memory[key].replaced, (now, pool.limit_bytes)), moved_at=now, reason=reason)

    grows: list[Limit] = []

    def hunger(pool: Pool) -> tuple[bool, float, str]:
        key = pool.launch_id
        return (pool.limit_bytes >= pool.least, -max(0, demands[key] - pool.limit_bytes) * pool.weight, key)

    for pool in sorted((p for p in known if target[p.launch_id] > p.limit_bytes), key=hunger):
        key = pool.launch_id
        free = min(left[gpu] for gpu in pool.gpus)
        new = min(target[key], pool.down(charges[key] + max(0, free)))
        urgent = pool.limit_bytes < max(pool.least, demands[key])
        if new <= pool.limit_bytes or (not urgent and _too_little(pool, memory[key], new - pool.limit_bytes, now)):
            continue
        for gpu in pool.gpus:
            left[gpu] -= max(0, new - charges[key])
        floor = pool.limit_bytes < pool.least
        reason = "up to its floor" if floor else "it needs more" if urgent else "a share of the surplus"
        limits[key] = replace(limits[key], limit_bytes=new, reason=reason)
        memory[key] = replace(memory[key], moved_at=now, reason=reason)
        grows.append(limits[key])
    return BudgetPlan(limits, (*shrinks, *grows), memory, tuple(sorted(short)))


def _too_little(pool: Pool, memory: PoolMemory, gap: int, now: float) -> bool:
    """Not worth a write that nothing forces: too small, or too soon after the last one."""
    return now - memory.moved_at < COOL_DOWN_S or gap < max(pool.bundle_bytes, DEAD_BAND * pool.most)


def _shrink(pool: Pool, memory: PoolMemory, target: int, wanted: int, pressure: bool, now: float) -> int:
    """The limit after a shrink: the whole gap at once where somebody needs it, else slowly and never below demand."""
    gap = pool.limit_bytes - target
    if gap <= 0:
        return pool.limit_bytes
    if pressure or pool.limit_bytes > pool.most:
        return max(target, pool.bundle_bytes)
    if _too_little(pool, memory, gap, now):
        return pool.limit_bytes
    step = max(pool.bundle_bytes, pool.down(gap / 8))
    return max(target, min(pool.down(pool.limit_bytes), wanted), pool.down(pool.limit_bytes - step), pool.bundle_bytes)
