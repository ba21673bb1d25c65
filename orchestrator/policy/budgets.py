"""Divide each GPU's KV memory: floors, then demand, then the surplus; shrink at once, grow only into memory that is seen.

The rule that keeps it right: what every engine may still take (`charge`) never sums to more than what exists (P), for any
prefix of the writes. An engine obeys a smaller limit only at its next allocation, so a shrink is credited when use is seen
to be below it, and never within SETTLE_S of the write.

Three tiers of weighted max-min (water filling): cgroups' memory.min and memory.low in spirit, the idle tax from VMware ESX.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SETTLE_S = 0.5  # an engine's watcher polls every 0.1 s; a shrink is not credited sooner than this after the write
COOL_DOWN_S = 2.0  # between two moves of a pool that nothing forces: the loop may look fifty times in that time
SLOW_TAU_S = 5.0  # how fast a past peak of use is forgotten
RATE_TAU_S = 1.0  # over how long growth is averaged: use moves in bundles of 100 MiB
LOOK_S = 1.0  # how far ahead growth is provided for: four looks
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
    live_bytes: int = 0  # what the largest request that it has, or that waits for it, needs to be able to end
    queued_bytes: int = 0  # what the requests that wait for it are expected to take
    # Made from the others once, because plan() reads them a dozen times a pool; whole bundles.
    mapped_bytes: int = field(init=False, repr=False, compare=False)
    most: int = field(init=False, repr=False, compare=False)
    least: int = field(init=False, repr=False, compare=False)
    alive: int = field(init=False, repr=False, compare=False)  # the part of its floor without which it stands still

    def __post_init__(self) -> None:
        bundle = self.bundle_bytes
        most = max(bundle, self.down(self.ceiling_bytes))
        made = object.__setattr__
        made(self, "mapped_bytes", self.used_bytes + self.prealloc_bytes)
        made(self, "most", most)
        made(self, "least", min(max(self.up(max(self.floor_bytes, self.live_bytes)), bundle), most))
        made(self, "alive", min(max(self.up(self.live_bytes), bundle), most))

    def down(self, size: float) -> int:
        return int(size // self.bundle_bytes) * self.bundle_bytes

    def up(self, size: float) -> int:
        return -int(-size // self.bundle_bytes) * self.bundle_bytes


@dataclass(slots=True)  # as the others, never changed once made; but not frozen: that makes making one three times as slow
class PoolMemory:
    """What must be remembered of a pool between two looks."""

    slow_bytes: float = 0.0  # use, falling slowly after a peak: never below any average of it
    used_bytes: int = 0
    rate: float = 0.0  # bytes a second at which it has been growing
    limit_bytes: int = 0  # the last one seen; a segment that somebody made anew says 0, and its engine goes on with this
    at: float = 0.0
    replaced: tuple[tuple[float, int], ...] = ()  # (when, the larger limit that a shrink replaced)
    moved_at: float = -1e9
    trimmed_at: float = -1e9
    reason: str = "what the engine started with"  # why its limit is what it is

    def moved(self, now: float, reason: str, replaced: tuple[tuple[float, int], ...]) -> "PoolMemory":
        """After a write. (dataclasses.replace costs four times as much, and plan() is called four times a second for every pool.)"""
        return PoolMemory(self.slow_bytes, self.used_bytes, self.rate, self.limit_bytes, self.at, replaced, now, self.trimmed_at, reason)


@dataclass(slots=True)  # as PoolMemory
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
    pressed: frozenset[str]  # GPUs where somebody lacks memory
    demands: Mapping[str, int]
    charges: Mapping[str, int]


def charge(pool: Pool, memory: PoolMemory, now: float) -> int:
    """The most that this engine may still hold before it has surely seen its limit."""
    most = max(pool.limit_bytes if pool.limit_bytes > 0 else memory.limit_bytes, pool.mapped_bytes, 0)
    for when, size in memory.replaced:
        if now - when < SETTLE_S and size > most:
            most = size
    return most


def demand(pool: Pool, memory: PoolMemory) -> int:
    """What it could use now: its use or a recent peak, what waits for it, and room to grow for as long as it is busy.

    The room: what it will take in the next second at its rate; a quarter more; twice its use when it has reached its limit, where
    no rate can be seen any more.
    """
    size = max(float(pool.used_bytes), memory.slow_bytes) + pool.queued_bytes
    if pool.busy:
        starved = pool.used_bytes + 2 * pool.bundle_bytes > pool.limit_bytes
        size += max(2.0 * pool.bundle_bytes, memory.rate * LOOK_S, pool.used_bytes if starved else pool.used_bytes / 4)
    return min(pool.up(size), pool.most)


def remember(pool: Pool, before: PoolMemory | None, now: float) -> PoolMemory:
    limit = max(pool.limit_bytes, 0)
    if before is None:
        return PoolMemory(slow_bytes=float(pool.used_bytes), used_bytes=pool.used_bytes, limit_bytes=limit, at=now)
    passed = max(0.0, now - before.at)
    rate = before.rate
    if passed > 0:
        fresh = max(0, pool.used_bytes - before.used_bytes) / passed
        rate = fresh + (rate - fresh) * math.exp(-passed / RATE_TAU_S)
    replaced = before.replaced
    if replaced:
        replaced = tuple((when, size) for when, size in replaced if now - when < SETTLE_S)
    return PoolMemory(
        slow_bytes=max(float(pool.used_bytes), before.slow_bytes * math.exp(-passed / SLOW_TAU_S)),
        used_bytes=pool.used_bytes,
        rate=rate if rate >= 1.0 else 0.0,
        limit_bytes=limit or before.limit_bytes,
        at=now,
        replaced=replaced,
        moved_at=before.moved_at,
        trimmed_at=before.trimmed_at,
        reason=before.reason,
    )


def waterfill(amount: float, needs: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weighted max-min: nobody gets more than its need; what one does not need goes to the others by weight. O(n log n)."""
    if sum(needs.values()) <= amount:
        return dict(needs)
    given: dict[str, float] = {}
    left, weight = max(0.0, amount), sum(weights[key] for key in needs)
    for _, key in sorted([(need / weights[key], key) for key, need in needs.items()]):
        share = left * weights[key] / weight if weight > 0 else 0.0
        need = needs[key]
        given[key] = share = need if need < share else max(0.0, share)
        left -= share
        weight -= weights[key]
    return given


def floors(pools: Sequence[Pool], amount: int) -> tuple[dict[str, int], list[str]]:
    """Each pool's floor. Where they do not all fit: a bundle each; then, heaviest first, what it needs to go on; then whole floors."""
    if sum(pool.least for pool in pools) <= amount:
        return {pool.launch_id: pool.least for pool in pools}, []
    given = {pool.launch_id: pool.bundle_bytes for pool in pools}
    left = amount - sum(given.values())
    heaviest_first = sorted(pools, key=lambda p: (-p.weight, p.launch_id))
    for whole in (False, True):
        for pool in heaviest_first:
            more = (pool.least if whole else pool.alive) - given[pool.launch_id]
            if more <= left:
                given[pool.launch_id] += more
                left -= more
    return given, [pool.launch_id for pool in heaviest_first if given[pool.launch_id] < pool.least]


def targets(pools: Sequence[Pool], amount: int, demands: Mapping[str, int], pressure: bool) -> tuple[dict[str, int], list[str]]:
    """Where each pool of one GPU should be, in whole bundles between its floor and its ceiling, within `amount`."""
    base, short = floors(pools, amount)
    weights: dict[str, float] = {}
    taxed: dict[str, float] = {}
    wanted: dict[str, float] = {}
    for pool in pools:
        key, weight = pool.launch_id, pool.weight
        need = demands[key] - base[key]
        weights[key], wanted[key] = weight, need if need > 0 else 0.0
        taxed[key] = weight if pool.busy else weight * (1 - IDLE_TAX * (1 - math.exp(-pool.idle_s / IDLE_TAU_S)))
    room = max(0.0, float(amount - sum(base.values())))
    by_demand = waterfill(room, wanted, weights)
    room -= sum(by_demand.values())
    head: dict[str, float] = {}
    for pool in pools:
        key = pool.launch_id
        left_to_ceiling = pool.most - base[key] - by_demand[key]
        head[key] = left_to_ceiling if left_to_ceiling > 0 else 0.0
    by_weight = waterfill(room if pressure else room - KEEP * amount, head, taxed)
    result: dict[str, int] = {}
    for pool in pools:
        key, bundle = pool.launch_id, pool.bundle_bytes
        size = int((base[key] + by_demand[key] + by_weight[key]) // bundle) * bundle
        result[key] = min(pool.most, max(base[key], size))
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
    on_gpu: dict[str, list[Pool]] = {gpu: [] for gpu in amounts}
    for pool in known:
        for gpu in pool.gpus:
            on_gpu[gpu].append(pool)
    for gpu, amount in amounts.items():
        here = on_gpu[gpu]
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
        if spanning := [p for p in on_gpu[gpu] if len(p.gpus) > 1]:
            others = [p for p in on_gpu[gpu] if len(p.gpus) == 1]
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
            limits[key] = Limit(key, pool.model, new, pool.limit_bytes, target[key], reason)
            shrinks.append(limits[key])
            memory[key] = memory[key].moved(now, reason, (*memory[key].replaced, (now, pool.limit_bytes)))

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
        limits[key] = Limit(key, pool.model, new, pool.limit_bytes, target[key], reason)
        memory[key] = memory[key].moved(now, reason, memory[key].replaced)
        grows.append(limits[key])
    return BudgetPlan(limits, (*shrinks, *grows), memory, tuple(sorted(short)), frozenset(pressed), demands, charges)


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
