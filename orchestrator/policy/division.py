"""Where each pool of one GPU should be: floors, then demand, then the surplus. Three tiers of weighted max-min (water filling).

The rule that keeps it right: the sizes are whole bundles between a pool's least and its most and sum to at most `amount`, but where
not even the floors fit. cgroups' memory.min and memory.low in spirit, the idle tax from VMware ESX.

Sizes travel in lists that run beside `pools`: this is divided four times a second for every GPU, and dicts cost twice the time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

IDLE_TAU_S = 30.0  # how fast an idle pool loses its claim on the surplus
IDLE_TAX = 0.75  # how much of that claim it loses
KEEP = 0.02  # of P, kept out of the surplus: a burst grows into it at once, without a shrink first


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


def waterfill(amount: float, needs: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    """Weighted max-min: nobody gets more than its need; what one does not need goes to the others by weight. O(n log n)."""
    if sum(needs) <= amount:
        return needs
    left, weight = (amount if amount > 0 else 0.0), sum(weights)
    fills = [need / share for need, share in zip(needs, weights, strict=True)]
    if min(fills) * weight >= left:  # the usual surplus: nobody is full
        return [left * share / weight for share in weights]
    given = [0.0] * len(fills)
    for at in sorted(range(len(fills)), key=fills.__getitem__):
        share = weights[at]
        given[at] = got = needs[at] if fills[at] * weight < left else left * share / weight
        left -= got
        weight -= share
        if left <= 0 or weight <= 0:
            break
    return given


def floors(pools: Sequence[Pool], amount: int) -> tuple[list[int], list[str]]:
    """Each pool's floor. Where they do not all fit: a bundle each; then, heaviest first, what it needs to go on; then whole floors."""
    given = [pool.least for pool in pools]
    if sum(given) <= amount:
        return given, []
    given = [pool.bundle_bytes for pool in pools]
    left = amount - sum(given)
    heaviest_first = sorted(range(len(pools)), key=lambda at: (-pools[at].weight, pools[at].launch_id))
    for whole in (False, True):
        for at in heaviest_first:
            more = (pools[at].least if whole else pools[at].alive) - given[at]
            if more <= left:
                given[at] += more
                left -= more
    return given, [pools[at].launch_id for at in heaviest_first if given[at] < pools[at].least]


def targets(pools: Sequence[Pool], amount: int, demands: Sequence[int], pressure: bool, held: int = 0) -> tuple[list[int], list[str]]:
    """Where each pool of one GPU should be, within `amount`; and the launches whose floor does not fit.

    A pool that holds more than its share keeps it until its requests end. Until then the others share what is really left, and
    only their floors may count on it. `held`: what pools that are not among these hold so, of the amount.
    """
    base, short = floors(pools, amount)
    sizes = _divide(pools, amount - held, base, demands, pressure)
    heavy = [at for at, pool in enumerate(pools) if pool.mapped_bytes > sizes[at]]
    light: Sequence[int] = range(len(pools))
    left = amount - held
    while heavy and len(heavy) < len(light):
        left -= sum([pools[at].mapped_bytes for at in heavy])
        light = [at for at in light if pools[at].mapped_bytes <= sizes[at]]
        again = _divide([pools[at] for at in light], left, [base[at] for at in light], [demands[at] for at in light], pressure)
        for at, size in zip(light, again, strict=True):
            sizes[at] = size
        heavy = [at for at in light if pools[at].mapped_bytes > sizes[at]]
    return sizes, short


def _divide(pools: Sequence[Pool], amount: int, base: Sequence[int], demands: Sequence[int], pressure: bool) -> list[int]:
    room: float = amount - sum(base)
    if room <= 0:
        return list(base)
    weights = [pool.weight for pool in pools]
    by_demand = waterfill(room, [need - have if need > have else 0 for need, have in zip(demands, base, strict=True)], weights)
    sizes = [have + more for have, more in zip(base, by_demand, strict=True)]
    room -= sum(by_demand) if pressure else sum(by_demand) + KEEP * amount
    if room > 0:
        head = [pool.most - size if pool.most > size else 0.0 for pool, size in zip(pools, sizes, strict=True)]
        sizes = [
            size + more
            for size, more in zip(sizes, waterfill(room, head, [pool.weight if pool.busy else _taxed(pool) for pool in pools]), strict=True)
        ]
    whole = [int(size // pool.bundle_bytes) * pool.bundle_bytes for pool, size in zip(pools, sizes, strict=True)]
    result = [have if size < have else size for size, have in zip(whole, base, strict=True)]
    if pressure:
        _hand_out(pools, amount - sum(result), demands, result)
    return result


def _taxed(pool: Pool) -> float:
    """An idle pool's weight where the surplus is divided."""
    return pool.weight * (1 - IDLE_TAX * (1 - math.exp(-pool.idle_s / IDLE_TAU_S)))


def _hand_out(pools: Sequence[Pool], left: int, demands: Sequence[int], sizes: list[int]) -> None:
    """Rounding left bundles over: nobody may be hungry while they lie there."""
    hungry = [at for at, pool in enumerate(pools) if sizes[at] < demands[at] and pool.bundle_bytes <= left]
    for at in sorted(hungry, key=lambda at: (-(demands[at] - sizes[at]) / pools[at].weight, pools[at].launch_id)):
        pool = pools[at]
        while sizes[at] < demands[at] and pool.bundle_bytes <= left and sizes[at] < pool.most:
            sizes[at] += pool.bundle_bytes
            left -= pool.bundle_bytes
