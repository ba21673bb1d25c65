"""How long plan() takes: random but seeded pools, one call after another in one process, medians.

8 pools are on one GPU; 64 and 512 on eight, a quarter of them over two or four GPUs. `calm`: everybody has what it needs. `pressed`:
demands are far above what is there, so every call divides, shrinks and grows again.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator import garbage
from orchestrator.policy.budgets import PoolMemory, plan
from orchestrator.policy.division import Pool

MIB, GIB = 1 << 20, 1 << 30
SIZES = (8, 64, 512)
KINDS = ("calm", "pressed")
SEEDS = 4
CALLS = {8: 100, 64: 15, 512: 3}  # of one set of pools, in one round
ROUNDS = 5  # sizes and kinds take turns, so that a slow second hits all of them
BUNDLES = (48 * MIB, 56 * MIB, 112 * MIB)


@dataclass(frozen=True)
class Case:
    pools: Sequence[Pool]
    amounts: Mapping[str, int]
    memory: Mapping[str, PoolMemory]


def measure() -> dict[str, float]:
    """plan_N_us over both kinds, plan_N_KIND_us, and how much more 512 take than 64 (8: the cost grows as the number does)."""
    garbage.settle()  # as the daemon does: else a fifth of the time is the collector's, which looks at all that the bench has made
    cases = {(size, kind): [_case(size, kind, seed) for seed in range(SEEDS)] for size in SIZES for kind in KINDS}
    took: dict[tuple[int, str], list[float]] = {key: [] for key in cases}
    for _ in range(ROUNDS):
        for (size, kind), several in cases.items():
            for case in several:
                for _ in range(CALLS[size]):
                    began = time.perf_counter_ns()
                    plan(case.pools, case.amounts, case.memory, 100.0)
                    took[size, kind].append((time.perf_counter_ns() - began) / 1000)
    figures: dict[str, float] = {}
    for size in SIZES:
        figures[f"plan_{size}_us"] = statistics.median([one for kind in KINDS for one in took[size, kind]])
        figures |= {f"plan_{size}_{kind}_us": statistics.median(took[size, kind]) for kind in KINDS}
    figures["plan_512_over_64"] = figures["plan_512_us"] / figures["plan_64_us"]
    return figures


def _case(size: int, kind: str, seed: int) -> Case:
    dice = random.Random(f"{size} {kind} {seed}")
    gpus = [f"GPU-{n}" for n in range(1 if size <= 8 else 8)]
    pools = [_pool(dice, number, gpus, size * 2 // len(gpus), kind) for number in range(size)]
    held = {gpu: sum(pool.used_bytes for pool in pools if gpu in pool.gpus) for gpu in gpus}
    amounts = {gpu: int(held[gpu] * (0.9 if kind == "pressed" else 4.0)) for gpu in gpus}
    first = plan(pools, amounts, {}, 99.0)  # so that the measured calls find a memory, as the loop's do
    return Case(pools, amounts, first.memory)


def _pool(dice: random.Random, number: int, gpus: Sequence[str], crowd: int, kind: str) -> Pool:
    """Everything that depends on Pool's fields. `crowd`: pools on a GPU, more or less."""
    bundle = dice.choice(BUNDLES)
    share = max(8, 130 * GIB // crowd // bundle)  # bundles
    used = dice.randint(1, share)
    limit = used if kind == "pressed" else dice.randint(used, 2 * share)
    busy = kind == "pressed" or dice.random() < 0.5
    ranks = dice.choice((1, 1, 1, 2)) if len(gpus) == 2 else dice.choice((1, 1, 1, 1, 1, 1, 2, 4)) if len(gpus) > 2 else 1
    return Pool(
        launch_id=f"launch-{number:04}",
        model=f"model-{number:04}",
        gpus=tuple(dice.sample(gpus, ranks)),
        bundle_bytes=bundle,
        floor_bytes=dice.randint(1, 4) * bundle,
        ceiling_bytes=dice.choice((2, 4, 100)) * share * bundle,
        weight=dice.choice((0.5, 1.0, 1.0, 2.0, 4.0)),
        limit_bytes=limit * bundle,
        used_bytes=used * bundle,
        prealloc_bytes=dice.randint(0, 2) * bundle,
        busy=busy,
        idle_s=0.0 if busy else dice.uniform(0, 300),
        live_bytes=dice.randint(1, 8) * bundle if busy else 0,
        queued_bytes=dice.choice((0, 0, 3)) * bundle if busy else 0,
    )
