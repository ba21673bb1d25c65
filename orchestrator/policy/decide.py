"""One decision about everything: known models + instances + one snapshot -> a Plan. Pure; the same input gives the same plan.

Order: each model's own next move (lifecycle), then claims, then who may start or wake and who goes for it (admission), then limits
(budgets). Shrinks stand before grows in the plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.policy import budgets
from orchestrator.policy.actions import Action, Repair, SetLimit, Trim
from orchestrator.policy.admission import Admission, claims_of, reserve_bytes
from orchestrator.policy.division import Pool
from orchestrator.policy.footprint import Footprint, floor_bytes, live_bytes
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known, Rules, step
from orchestrator.policy.residency import Victim
from orchestrator.policy.resident import Aging
from orchestrator.policy.snapshot import GpuReading, Snapshot, TrafficSeen
from orchestrator.policy.units import show_bytes

FRESH = Aging()
PRESSED_TRIM_S = 0.5  # on a GPU where somebody lacks memory, an idle engine gives back at once


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """One GPU's memory, divided. total = reserve + foreign + fixed + claims + pool, where pool may be negative under a foreign grab."""

    total_bytes: int
    used_bytes: int
    reserve_bytes: int
    claims_bytes: int
    fixed_bytes: int  # ours, besides KV
    foreign_bytes: int
    kv_mapped_bytes: int
    kv_limit_bytes: int
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool's bounds and its limit's status: applied, draining (above it) or unverified, with the reason.

    `sure_bytes`: what the engine surely lets requests use now. `target_bytes`: where the limit is going.
    """

    floor_bytes: int
    ceiling_bytes: int
    bundle_bytes: int
    limit_bytes: int
    sure_bytes: int
    target_bytes: int
    demand_bytes: int
    charge_bytes: int
    weight: float
    status: str
    reason: str
    short: bool


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    instances: Mapping[str, Instance]
    pool_memory: Mapping[str, budgets.PoolMemory]
    gpus: Mapping[str, GpuBudget]
    pools: Mapping[str, PoolView]  # by launch id
    claims: Mapping[tuple[str, str], int]  # (model, GPU) -> bytes promised and not taken yet
    aging: Aging = FRESH
    leaving: tuple[Victim, ...] = ()  # who is sent away for another model


def decide(
    known: Mapping[str, Known],
    instances: Mapping[str, Instance],
    pool_memory: Mapping[str, budgets.PoolMemory],
    snapshot: Snapshot,
    rules: Rules,
    launch_id: Callable[[], str],
    aging: Aging = FRESH,
) -> Plan:
    """`launch_id` gives a fresh id each time it is called (the only thing here that is not a plain value)."""
    actions: list[Action] = []
    after: dict[str, Instance] = {}
    for name in sorted(known.keys() | instances.keys()):
        before = instances.get(name, Instance(name, since=snapshot.now))
        moved, wants = step(before, known.get(name), snapshot, rules)
        actions.extend(wants)
        if name in known or moved.state is not State.STOPPED:
            after[name] = moved

    pools = _pools(after, known, snapshot)
    line = Admission(after, known, pools, claims_of(after, known, snapshot), snapshot, rules, launch_id, actions, aging)
    line.run()

    amounts = {
        uuid: gpu.free_bytes + sum(p.mapped_bytes for p in pools if uuid in p.gpus) - reserve_bytes(gpu, rules) - line.claimed(uuid)
        for uuid, gpu in snapshot.gpus.items()
        if gpu.error is None  # an old reading decides nothing: its limits stay as they are
    }
    planned = budgets.plan(pools, amounts, pool_memory, snapshot.now)
    actions.extend(SetLimit(w.launch_id, w.model, w.limit_bytes, w.was_bytes, w.reason) for w in planned.writes)
    memory = _trim(pools, planned, known, after, snapshot, actions)
    _repair(after, snapshot, actions)
    return Plan(
        actions=tuple(actions),
        instances=after,
        pool_memory=memory,
        gpus={uuid: _budget(gpu, after, pools, planned, line.claimed(uuid), snapshot, rules) for uuid, gpu in snapshot.gpus.items()},
        pools={p.launch_id: _view(p, planned, snapshot) for p in pools},
        claims=line.claims,
        aging=line.aging,
        leaving=tuple(line.leaving),
    )


def _pools(instances: Mapping[str, Instance], known: Mapping[str, Known], snapshot: Snapshot) -> list[Pool]:
    """Every KV pool that exists and that we steer: its segment is there, its geometry is known, and it is not being ended."""
    pools = []
    for instance in instances.values():
        launch = instance.launch
        seen = snapshot.engines.get(launch.id) if launch else None
        if launch is None or seen is None or seen.segment is None or instance.state in (State.STOPPING, State.WAITING):
            continue
        model = known.get(instance.model)
        footprint = model.footprint if model else Footprint("unknown")
        bundle = seen.bundle_bytes or footprint.bundle_bytes or seen.segment.used_bytes
        capacity = min(seen.capacity_bytes or launch.ceiling_bytes, launch.ceiling_bytes)
        if bundle <= 0 or capacity < bundle:
            continue
        spec = model.spec if model else launch.spec
        asleep = instance.state is State.ASLEEP or instance.sent_at is not None  # holds its null bundle, and needs no more
        traffic = snapshot.traffic.get(instance.model, TrafficSeen())
        idle_s = snapshot.now - max(traffic.last_used if traffic.last_used is not None else instance.since, instance.since)
        pools.append(
            Pool(
                launch_id=launch.id,
                model=instance.model,
                gpus=launch.gpus,
                bundle_bytes=bundle,
                floor_bytes=bundle if asleep else floor_bytes(spec, footprint) if model else launch.floor_bytes,
                # above the start-up total (`capacity`) an engine corrupts its KV or dies
                ceiling_bytes=bundle if asleep else capacity if spec.kv_ceiling is None else min(capacity, spec.kv_ceiling),
                weight=spec.kv_weight * 2.0**spec.priority,
                limit_bytes=seen.segment.limit_bytes,
                used_bytes=seen.segment.used_bytes,
                prealloc_bytes=seen.segment.prealloc_bytes,
                busy=traffic.in_flight + traffic.waiting > 0,
                idle_s=0.0 if traffic.in_flight + traffic.waiting else max(0.0, idle_s),
                live_bytes=live_bytes(footprint, traffic.largest_tokens),
                queued_bytes=traffic.waiting_tokens * footprint.kv_token_bytes,
            )
        )
    return pools


def _budget(
    gpu: GpuReading,
    instances: Mapping[str, Instance],
    pools: list[Pool],
    planned: budgets.BudgetPlan,
    claims: int,
    snapshot: Snapshot,
    rules: Rules,
) -> GpuBudget:
    here = [p for p in pools if gpu.uuid in p.gpus]
    mapped = sum(p.mapped_bytes for p in here)
    ours = sum(snapshot.held_bytes(i.launch.id, gpu.uuid) for i in instances.values() if i.launch and gpu.uuid in i.launch.gpus)
    fixed = max(0, ours - mapped)
    reserve = reserve_bytes(gpu, rules)
    return GpuBudget(
        total_bytes=gpu.total_bytes,
        used_bytes=gpu.used_bytes,
        reserve_bytes=reserve,
        claims_bytes=claims,
        fixed_bytes=fixed,
        foreign_bytes=gpu.used_bytes - mapped - fixed,
        kv_mapped_bytes=mapped,
        kv_limit_bytes=sum(planned.limits[p.launch_id].limit_bytes for p in here if p.launch_id in planned.limits),
        pool_bytes=gpu.free_bytes + mapped - reserve - claims,
    )


def _trim(
    pools: list[Pool],
    planned: budgets.BudgetPlan,
    known: Mapping[str, Known],
    instances: Mapping[str, Instance],
    snapshot: Snapshot,
    actions: list[Action],
) -> dict[str, budgets.PoolMemory]:
    """Once in each idle period an engine gives back what it can do without; sooner where somebody lacks memory."""
    memory = dict(planned.memory)
    for pool in pools:
        model, before = known.get(pool.model), memory.get(pool.launch_id)
        if model is None or before is None or pool.busy or instances[pool.model].state is not State.READY:
            continue
        pressed = any(gpu in planned.pressed for gpu in pool.gpus)
        after_s = PRESSED_TRIM_S if pressed else model.spec.idle_trim
        if after_s is not None and pool.idle_s >= after_s and before.trimmed_at < snapshot.now - pool.idle_s:
            reason = "idle, and others need memory" if pressed else f"idle for {pool.idle_s:.0f}s"
            actions.append(Trim(pool.launch_id, pool.model, reason))
            memory[pool.launch_id] = replace(before, trimmed_at=snapshot.now)
    return memory


def _repair(instances: Mapping[str, Instance], snapshot: Snapshot, actions: list[Action]) -> None:
    for instance in instances.values():
        seen = snapshot.engines.get(instance.launch.id) if instance.launch else None
        if instance.state is State.READY and seen is not None and seen.ready and (seen.segment_lost or seen.segment is None):
            actions.append(Repair(seen.launch_id, instance.model, "its segment is gone, or is none any more"))


def _view(pool: Pool, planned: budgets.BudgetPlan, snapshot: Snapshot) -> PoolView:
    limit = planned.limits.get(pool.launch_id)
    size = limit.limit_bytes if limit else pool.limit_bytes
    reason = limit.reason if limit else "its GPU cannot be read: left as it is"
    acked = snapshot.engines[pool.launch_id].acked_limit_bytes
    if pool.mapped_bytes > size:
        status = "draining"
        reason += f"; {show_bytes(pool.mapped_bytes - size)} above it leave as requests finish"
    elif acked == size == pool.limit_bytes:
        status = "applied"
    else:
        status = "unverified"
    return PoolView(
        floor_bytes=pool.least,
        ceiling_bytes=pool.most,
        bundle_bytes=pool.bundle_bytes,
        limit_bytes=size,
        sure_bytes=size if acked is None else min(size, acked),
        target_bytes=limit.target_bytes if limit else size,
        demand_bytes=planned.demands.get(pool.launch_id, pool.used_bytes),
        charge_bytes=planned.charges.get(pool.launch_id, pool.mapped_bytes),
        weight=pool.weight,
        status=status,
        reason=reason,
        short=pool.launch_id in planned.short,
    )
