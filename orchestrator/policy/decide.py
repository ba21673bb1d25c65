"""One decision about everything: known models + instances + one snapshot -> a Plan. Pure; the same input gives the same plan.

Order: each model's own next move (lifecycle), then claims, then who may start (placement, one start a GPU at a time), then
limits (budgets). Shrinks stand before grows in the plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.policy import budgets
from orchestrator.policy.actions import Action, Repair, SetLimit, Start, Trim
from orchestrator.policy.division import Pool
from orchestrator.policy.footprint import Footprint, floor_bytes, live_bytes
from orchestrator.policy.instance import Instance, Launch, State
from orchestrator.policy.lifecycle import Known, Rules, step
from orchestrator.policy.model import slug
from orchestrator.policy.placement import Placed, allowed, place
from orchestrator.policy.snapshot import GpuReading, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB, show_bytes

PRESSED_TRIM_S = 0.5  # on a GPU where somebody lacks memory, an idle engine gives back at once
KV_HEADROOM = 0.02  # kvcached stops mapping when less of the card is free (we set KVCACHED_GPU_UTILIZATION=0.98)


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
    claims: Mapping[tuple[str, str], int]  # (launch id, GPU) -> bytes promised and not taken yet


def reserve_bytes(gpu: GpuReading, rules: Rules) -> int:
    """Kept free on each GPU: activations peak together, and other processes come without asking."""
    if rules.reserve_bytes is not None:
        return rules.reserve_bytes
    return max(int(0.03 * gpu.total_bytes), int(KV_HEADROOM * gpu.total_bytes) + GIB // 2)


def decide(
    known: Mapping[str, Known],
    instances: Mapping[str, Instance],
    pool_memory: Mapping[str, budgets.PoolMemory],
    snapshot: Snapshot,
    rules: Rules,
    launch_id: Callable[[], str],
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
    claims = dict.fromkeys(snapshot.gpus, 0)
    for (_, gpu_uuid), size in _claims(after, snapshot).items():
        if gpu_uuid in claims:
            claims[gpu_uuid] += size
    _admit(after, known, pools, claims, snapshot, rules, launch_id, actions)

    amounts = {
        uuid: gpu.free_bytes + sum(p.mapped_bytes for p in pools if uuid in p.gpus) - reserve_bytes(gpu, rules) - claims[uuid]
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
        gpus={uuid: _budget(gpu, after, pools, planned, claims[uuid], snapshot, rules) for uuid, gpu in snapshot.gpus.items()},
        pools={p.launch_id: _view(p, planned, snapshot) for p in pools},
        claims=_claims(after, snapshot),
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
        traffic = snapshot.traffic.get(instance.model, TrafficSeen())
        idle_s = snapshot.now - max(traffic.last_used if traffic.last_used is not None else instance.since, instance.since)
        pools.append(
            Pool(
                launch_id=launch.id,
                model=instance.model,
                gpus=launch.gpus,
                bundle_bytes=bundle,
                floor_bytes=floor_bytes(spec, footprint) if model else launch.floor_bytes,
                # above the start-up total (`capacity`) an engine corrupts its KV or dies
                ceiling_bytes=capacity if spec.kv_ceiling is None else min(capacity, spec.kv_ceiling),
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


def _claims(instances: Mapping[str, Instance], snapshot: Snapshot) -> dict[tuple[str, str], int]:
    """(launch id, GPU) -> what starts under way will still take there, and NVML cannot show yet."""
    return {
        (i.launch.id, gpu): _claim(i.launch, gpu, snapshot)
        for i in instances.values()
        if i.launch is not None and (i.state is State.STARTING or i.reserved)
        for gpu in i.launch.gpus
    }


def _claim(launch: Launch, gpu: str, snapshot: Snapshot) -> int:
    seen = snapshot.engines.get(launch.id)
    if seen is None or seen.segment is None:
        return max(0, launch.claim_bytes + launch.floor_bytes - snapshot.held_bytes(launch.id, gpu))
    return max(0, launch.claim_bytes - (snapshot.held_bytes(launch.id, gpu) - seen.segment.mapped_bytes))


def _admit(
    instances: dict[str, Instance],
    known: Mapping[str, Known],
    pools: list[Pool],
    claims: dict[str, int],
    snapshot: Snapshot,
    rules: Rules,
    launch_id: Callable[[], str],
    actions: list[Action],
) -> None:
    """Let the first in line start: by priority, then by who waits longest.

    Two steps. Reserve: it fits beside everybody's floor, so its bytes are claimed and the others' limits make room.
    Start: those bytes are seen free. A claim that nobody can honour any more (a foreign process came) is given up.
    """
    taken = {gpu for i in instances.values() if i.state is State.STARTING and i.launch for gpu in i.launch.gpus}
    readable = {uuid: gpu for uuid, gpu in snapshot.gpus.items() if gpu.error is None}
    line = [i for i in instances.values() if i.state is State.WAITING and i.model in known]
    for instance in sorted(line, key=lambda i: (-known[i.model].spec.priority, i.since, i.model)):
        model, now = known[instance.model], snapshot.now
        if instance.reserved and instance.launch:
            for gpu in instance.launch.gpus:
                if gpu in claims:
                    claims[gpu] -= _claim(instance.launch, gpu, snapshot)
        room = {
            uuid: gpu.free_bytes + sum(p.mapped_bytes - p.least for p in pools if uuid in p.gpus) - reserve_bytes(gpu, rules) - claims[uuid]
            for uuid, gpu in readable.items()
        }
        claim, floor = model.footprint.start_bytes, floor_bytes(model.spec, model.footprint)
        turn = {uuid: size for uuid, size in room.items() if uuid not in taken}
        placed = place(model.spec, claim + floor, turn, readable)
        if not isinstance(placed, Placed):
            anywhere = place(model.spec, claim + floor, room, readable)
            reason = "another engine is starting on its GPU" if isinstance(anywhere, Placed) else placed.reason
            candidates, unknown = allowed(model.spec, snapshot.gpus)
            if unknown:
                reason = f"no GPU here is {', '.join(map(str, unknown))}"
            elif not candidates or not all(uuid in readable for uuid in candidates):
                reason = "its GPUs cannot be read: " + "; ".join(str(snapshot.gpus[u].error) for u in candidates if u not in readable)
            instances[instance.model] = replace(instance, reserved=False, launch=None, reason=reason)
            continue
        seen_free = {uuid: readable[uuid].free_bytes - reserve_bytes(readable[uuid], rules) - claims[uuid] for uuid in placed.gpus}
        fresh = _launch(model, placed.gpus, claim, floor, readable, rules, launch_id())
        taken.update(placed.gpus)
        for gpu in placed.gpus:
            claims[gpu] += claim + floor
        if all(free >= claim + floor for free in seen_free.values()):
            where = ", ".join(str(readable[uuid].index) for uuid in placed.gpus)
            reason = f"{instance.reason}; {show_bytes(claim + floor)} are free on GPU {where}"
            instances[instance.model] = instance.to(State.STARTING, now, reason, launch=fresh, reserved=False, peak_bytes=0)
            actions.append(Start(fresh, reason))
        else:
            reason = f"{show_bytes(claim + floor)} are promised to it; others are giving them back"
            instances[instance.model] = replace(instance, reserved=True, launch=fresh, reason=reason)


def _launch(
    model: Known, gpus: tuple[str, ...], claim: int, floor: int, readings: Mapping[str, GpuReading], rules: Rules, fresh_id: str
) -> Launch:
    room = min(readings[uuid].total_bytes - reserve_bytes(readings[uuid], rules) for uuid in gpus)
    ceiling = max(floor, room - model.footprint.ready_bytes)  # all that the card could give: kv_ceiling may change while it runs
    if bundle := model.footprint.bundle_bytes:
        ceiling = max(bundle, ceiling // bundle * bundle)
    return Launch(
        id=fresh_id,
        ipc_name=f"orch-{slug(model.spec.name)}-{fresh_id}"[:40],
        spec=model.spec,
        gpus=gpus,
        claim_bytes=claim,
        floor_bytes=min(floor, ceiling),
        ceiling_bytes=ceiling,
        expected_start_s=model.footprint.start_s,
    )


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
        if instance.state is State.READY and seen is not None and seen.ready and seen.segment is None:
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
