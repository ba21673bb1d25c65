"""One GPU's memory as lines that add up to the card, and each limit's reason with what would change it. Pure projections of a plan."""

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.policy.decide import Plan, PoolView
from orchestrator.policy.instance import HAS_ENGINE, Instance
from orchestrator.policy.snapshot import Snapshot
from orchestrator.policy.units import show_bytes


@dataclass(frozen=True, slots=True)
class Line:
    """`what`: reserve, foreign, fixed (an engine's weights, contexts …), kv (mapped), claim, or room (free for KV; negative: missing).

    `pid` is set for a foreign process that the driver names.
    """

    what: str
    bytes: int
    why: str
    model: str | None = None
    pid: int | None = None


def lines(uuid: str, snapshot: Snapshot, plan: Plan) -> list[Line]:
    """They sum to the card's total."""
    gpu, budget = snapshot.gpus[uuid], plan.gpus[uuid]
    found = [Line("reserve", budget.reserve_bytes, "kept free for activation peaks and for others")]
    ours: set[int] = set()
    fixed_left, kv_left = budget.fixed_bytes, budget.kv_mapped_bytes
    for instance in _engines(plan):
        launch = instance.launch
        assert launch is not None
        if uuid not in launch.gpus:
            continue
        if seen := snapshot.engines.get(launch.id):  # None in the very look that starts it
            ours |= seen.pids
            kv = seen.segment.mapped_bytes if launch.id in plan.pools and seen.segment else 0
            fixed = min(max(0, snapshot.held_bytes(launch.id, uuid) - kv), fixed_left)
            fixed_left, kv_left = fixed_left - fixed, kv_left - kv
            found.append(Line("fixed", fixed, "weights, context, workspaces", instance.model))
            found.append(Line("kv", kv, "mapped now; the limit says how far it may grow", instance.model))
        if claim := plan.claims.get((instance.model, uuid), 0):
            found.append(Line("claim", claim, "promised to it, and not taken yet", instance.model))
    for (model, gpu_uuid), claim in sorted(plan.claims.items()):
        engine = plan.instances[model].launch if plan.instances[model].state in HAS_ENGINE else None
        if gpu_uuid == uuid and (engine is None or uuid not in engine.gpus):
            found.append(Line("claim", claim, "promised to it; it starts when it is seen free", model))
    foreign_left = budget.foreign_bytes
    for pid, size in sorted(gpu.processes.items(), key=lambda item: -item[1]):
        if pid not in ours:
            found.append(Line("foreign", size, "not ours: counted, never touched", pid=pid))
            foreign_left -= size
    found.append(Line("foreign", foreign_left + fixed_left + kv_left, "driver, and processes that it does not name"))
    rest = budget.total_bytes - sum(line.bytes for line in found)
    found.append(Line("room", rest, "free for KV to grow into" if rest >= 0 else "missing: others took it, and limits shrink"))
    return [line for line in found if line.bytes or line.what in ("reserve", "room")]


def change(pool: PoolView) -> str:
    """What would change its limit, in words."""
    if pool.short:
        return "less memory elsewhere: stop a model, lower a floor, or raise this one's priority"
    if pool.status == "draining":
        return f"its requests ending: {show_bytes(pool.target_bytes)} is where it goes"
    if pool.limit_bytes < pool.target_bytes:
        return f"memory that is seen free: up to {show_bytes(pool.target_bytes)}"
    if pool.limit_bytes >= pool.ceiling_bytes:
        return "a higher kv_ceiling" if pool.demand_bytes >= pool.ceiling_bytes else "nothing: it is at its ceiling"
    if pool.demand_bytes > pool.limit_bytes:
        return "others needing less, a higher floor, or a higher priority"
    return "others' use, its own use, or another weight"


def _engines(plan: Plan) -> Iterator[Instance]:
    return (plan.instances[name] for name in sorted(plan.instances) if plan.instances[name].state in HAS_ENGINE)
