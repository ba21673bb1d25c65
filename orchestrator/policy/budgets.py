"""Move each GPU's KV limits to where they should be (division.py): shrink at once, grow only into memory that is seen.

The rule that keeps it right: what every engine may still take (`charge`) never sums to more than what exists (P), for any
prefix of the writes. An engine obeys a smaller limit only at its next allocation, so a shrink is credited when use is seen
to be below it, and never within SETTLE_S of the write.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter

from orchestrator.policy.division import Pool, targets

SETTLE_S = 0.5  # an engine's watcher polls every 0.1 s; a shrink is not credited sooner than this after the write
COOL_DOWN_S = 2.0  # between two moves of a pool that nothing forces: the loop may look fifty times in that time
SLOW_TAU_S = 5.0  # how fast a past peak of use is forgotten
RATE_TAU_S = 1.0  # over how long growth is averaged: use moves in bundles of 100 MiB
LOOK_S = 1.0  # how far ahead growth is provided for: four looks
DEAD_BAND = 0.01  # of the ceiling: smaller moves are not worth a write


@dataclass(slots=True)  # as the others, never changed once made; but not frozen: that makes making one three times as slow
class PoolMemory:
    """What must be remembered of a pool between two looks."""

    slow_bytes: float = 0.0  # use, falling slowly after a peak: never below any average of it
    used_bytes: int = 0
    rate: float = 0.0  # bytes a second at which it has been growing
    limit_bytes: int = 0  # the last one seen or written; where somebody zeroed the segment, its engine goes on with this
    at: float = 0.0
    replaced: tuple[tuple[float, int], ...] = ()  # (when, the larger limit that a shrink replaced)
    moved_at: float = -1e9
    trimmed_at: float = -1e9
    reason: str = "what the engine started with"  # why its limit is what it is

    def moved(self, now: float, limit: int, reason: str, replaced: tuple[tuple[float, int], ...]) -> "PoolMemory":
        """After a write. (dataclasses.replace costs four times as much, and plan() is called four times a second for every pool.)"""
        return PoolMemory(self.slow_bytes, self.used_bytes, self.rate, limit, self.at, replaced, now, self.trimmed_at, reason)


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
    most = pool.limit_bytes if pool.limit_bytes > 0 else memory.limit_bytes
    if pool.mapped_bytes > most:
        most = pool.mapped_bytes
    for when, size in memory.replaced:
        if now - when < SETTLE_S and size > most:
            most = size
    return most


def demand(pool: Pool, memory: PoolMemory) -> int:
    """What it could use now: its use or a recent peak, what waits for it, and room to grow for as long as it is busy.

    The room: what it will take in the next second at its rate; a quarter more; twice its use when it has reached its limit, where
    no rate can be seen any more.
    """
    used, bundle = pool.used_bytes, pool.bundle_bytes
    size = (memory.slow_bytes if memory.slow_bytes > used else used) + pool.queued_bytes
    if pool.busy:
        starved = used + 2 * bundle > pool.limit_bytes
        size += max(2.0 * bundle, memory.rate * LOOK_S, used if starved else used / 4)
    whole = pool.up(size)
    return whole if whole < pool.most else pool.most


def remember(pool: Pool, before: PoolMemory | None, now: float) -> PoolMemory:
    used, limit = pool.used_bytes, pool.limit_bytes
    if before is None:
        return PoolMemory(float(used), used, 0.0, limit if limit > 0 else 0, now)
    passed = now - before.at
    slow, rate, replaced = before.slow_bytes, before.rate, before.replaced
    if slow > used:
        slow *= math.exp(-passed / SLOW_TAU_S) if passed > 0 else 1.0
    if passed > 0 and (rate or used > before.used_bytes):
        fresh = (used - before.used_bytes) / passed if used > before.used_bytes else 0.0
        rate = fresh + (rate - fresh) * math.exp(-passed / RATE_TAU_S)
    if replaced:
        replaced = tuple((when, size) for when, size in replaced if now - when < SETTLE_S)
    return PoolMemory(
        slow if slow > used else float(used),
        used,
        rate if rate >= 1.0 else 0.0,
        limit if limit > 0 else before.limit_bytes,
        now,
        replaced,
        before.moved_at,
        before.trimmed_at,
        before.reason,
    )


def plan(pools: Sequence[Pool], amounts: Mapping[str, int], before: Mapping[str, PoolMemory], now: float) -> BudgetPlan:
    """Limits for all pools over all GPUs. `amounts`: pool memory P per GPU uuid; pools on a GPU without one are left as they are.

    Same input, same output; the order of `pools` does not matter.
    """
    memory = {pool.launch_id: remember(pool, before.get(pool.launch_id), now) for pool in pools}
    charges = {pool.launch_id: charge(pool, memory[pool.launch_id], now) for pool in pools}
    rooms = dict(amounts)  # of each GPU, for the pools that we steer
    left = dict(amounts)  # of each GPU, what nobody may still take
    here: dict[str, list[Pool]] = {gpu: [] for gpu in amounts}
    known: list[Pool] = []
    demands: dict[str, int] = {}
    for pool in sorted(pools, key=_launch_id):
        size, frozen = charges[pool.launch_id], False
        for gpu in pool.gpus:
            if gpu in left:
                left[gpu] -= size
            else:
                frozen = True
        if frozen:  # it spans a GPU that cannot be read: what it may take on the others is not to be given away
            for gpu in pool.gpus:
                if gpu in rooms:
                    rooms[gpu] -= size
            continue
        known.append(pool)
        demands[pool.launch_id] = demand(pool, memory[pool.launch_id])
        for gpu in pool.gpus:
            here[gpu].append(pool)

    pressed = {gpu for gpu, several in here.items() if left[gpu] < 0 or any(_lacks(pool, demands) for pool in several)}
    target, short = _targets(here, rooms, demands, pressed)

    limits: dict[str, Limit] = {}
    shrinks: list[Limit] = []
    growing: list[Pool] = []
    for pool in known:
        key, limit, goal = pool.launch_id, pool.limit_bytes, target[pool.launch_id]
        if goal > limit:
            growing.append(pool)
        elif goal < limit:
            under_pressure = not pressed.isdisjoint(pool.gpus)
            new = _shrink(pool, memory[key], goal, demands[key], under_pressure, now)
            if new < limit:
                reason = _why_less(pool, key in short, under_pressure)
                limits[key] = shrunk = Limit(key, pool.model, new, limit, goal, reason)
                shrinks.append(shrunk)
                memory[key] = memory[key].moved(now, new, reason, (*memory[key].replaced, (now, limit)))
                continue
        limits[key] = Limit(key, pool.model, limit, limit, goal, memory[key].reason)

    grows: list[Limit] = []
    for pool in sorted(growing, key=lambda pool: _hunger(pool, demands)):
        key = pool.launch_id
        free = min([left[gpu] for gpu in pool.gpus])
        new = min(target[key], pool.down(charges[key] + max(0, free)))
        urgent = _lacks(pool, demands)
        if new <= pool.limit_bytes or (not urgent and _too_little(pool, memory[key], new - pool.limit_bytes, now)):
            continue
        for gpu in pool.gpus:
            left[gpu] -= max(0, new - charges[key])
        floor = pool.limit_bytes < pool.least
        reason = "up to its floor" if floor else "it needs more" if urgent else "a share of the surplus"
        limits[key] = Limit(key, pool.model, new, pool.limit_bytes, target[key], reason)
        last, replaced = memory[key].limit_bytes, memory[key].replaced
        if last > new:  # its segment says 0: until it has seen this limit, its engine goes on with the last one
            replaced = (*replaced, (now, last))
        memory[key] = memory[key].moved(now, new, reason, replaced)
        grows.append(limits[key])
    return BudgetPlan(limits, (*shrinks, *grows), memory, tuple(sorted(short)), frozenset(pressed), demands, charges)


_launch_id = attrgetter("launch_id")


def _targets(
    here: Mapping[str, Sequence[Pool]], rooms: Mapping[str, int], demands: Mapping[str, int], pressed: Set[str]
) -> tuple[dict[str, int], set[str]]:
    """Every pool's target, and the launches whose floor does not fit. Tensor parallel: the smallest share over its GPUs."""
    target: dict[str, int] = {}
    short: set[str] = set()
    shares: dict[str, Sequence[int]] = {}
    for gpu, several in here.items():
        sizes, lacking = targets(several, rooms[gpu], [demands[pool.launch_id] for pool in several], gpu in pressed)
        short.update(lacking)
        shares[gpu] = sizes
        for pool, size in zip(several, sizes, strict=True):
            key = pool.launch_id
            if size < target.get(key, size + 1):
                target[key] = size
    for gpu, several in here.items():  # what a pool leaves here, because another of its GPUs is tighter, goes to the others
        others: list[Pool] = []
        room, held, leaves = rooms[gpu], 0, False
        for pool, size in zip(several, shares[gpu], strict=True):
            if len(pool.gpus) == 1:
                others.append(pool)
            else:
                taken = target[pool.launch_id]
                leaves = leaves or taken < size
                room -= taken
                held += max(0, pool.mapped_bytes - taken)
        if leaves:
            sizes, lacking = targets(others, room, [demands[pool.launch_id] for pool in others], gpu in pressed, held)
            again = {pool.launch_id: size for pool, size in zip(others, sizes, strict=True)}
            target.update(again)
            short = (short - again.keys()) | set(lacking)
    return target, short


def _lacks(pool: Pool, demands: Mapping[str, int]) -> bool:
    limit = pool.limit_bytes
    return limit < pool.least or limit < demands[pool.launch_id]


def _hunger(pool: Pool, demands: Mapping[str, int]) -> tuple[bool, float, str]:
    """Floors first, then the largest need by weight."""
    return (pool.limit_bytes >= pool.least, -max(0, demands[pool.launch_id] - pool.limit_bytes) * pool.weight, pool.launch_id)


def _why_less(pool: Pool, short: bool, pressure: bool) -> str:
    if pool.limit_bytes > pool.most:
        return "above its ceiling"
    if short:
        return "floors do not fit"
    return "others need memory" if pressure else "it needs less"


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
