"""One decision about everything: known models + instances + one snapshot -> a Plan. Pure; the same input gives the same plan.

Order: each model's own next move (lifecycle), then claims, then who may start (placement, one start a GPU at a time), then
limits (budgets). Shrinks stand before grows in the plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.policy import budgets
from orchestrator.policy.actions import Action, SetLimit, Start
from orchestrator.policy.footprint import floor_bytes
from orchestrator.policy.instance import Instance, Launch, State
from orchestrator.policy.lifecycle import Known, Rules, step
from orchestrator.policy.model import slug
from orchestrator.policy.placement import Placed, allowed, place
from orchestrator.policy.snapshot import GpuReading, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB, show_bytes

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
    """A pool's bounds and its limit's status: applied, draining (above it) or unverified, with the reason."""

    floor_bytes: int
    ceiling_bytes: int
    bundle_bytes: int
    limit_bytes: int
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    actions: tuple[Action, ...]
    instances: Mapping[str, Instance]
    pool_memory: Mapping[str, budgets.PoolMemory]
    gpus: Mapping[str, GpuBudget]
    pools: Mapping[str, PoolView]  # by launch id


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
    claims = _claims(after, snapshot)
    _admit(after, known, pools, claims, snapshot, rules, launch_id, actions)

    amounts = {
        uuid: gpu.free_bytes + sum(p.mapped_bytes for p in pools if uuid in p.gpus) - reserve_bytes(gpu, rules) - claims[uuid]
        for uuid, gpu in snapshot.gpus.items()
        if gpu.error is None  # an old reading decides nothing: its limits stay as they are
    }
    planned = budgets.plan(pools, amounts, pool_memory, snapshot.now)
    actions.extend(SetLimit(w.launch_id, w.model, w.limit_bytes, w.was_bytes, w.reason) for w in planned.writes)
    return Plan(
        actions=tuple(actions),
        instances=after,
        pool_memory=planned.memory,
        gpus={uuid: _budget(gpu, after, pools, planned, claims[uuid], snapshot, rules) for uuid, gpu in snapshot.gpus.items()},
        pools={p.launch_id: _view(p, planned, snapshot) for p in pools},
    )


def _pools(instances: Mapping[str, Instance], known: Mapping[str, Known], snapshot: Snapshot) -> list[budgets.Pool]:
    """Every KV pool that exists and that we steer: its segment is there, its geometry is known, and it is not being ended."""
    pools = []
    for instance in instances.values():
        launch = instance.launch
        seen = snapshot.engines.get(launch.id) if launch else None
        if launch is None or seen is None or seen.segment is None or instance.state in (State.STOPPING, State.WAITING):
            continue
        model = known.get(instance.model)
        footprint_bundle = model.footprint.bundle_bytes if model else 0
        bundle = seen.bundle_bytes or footprint_bundle or seen.segment.used_bytes
        capacity = seen.capacity_bytes or launch.ceiling_bytes
        if bundle <= 0 or capacity < bundle:
            continue
        spec = model.spec if model else launch.spec
        traffic = snapshot.traffic.get(instance.model, TrafficSeen())
        idle_s = snapshot.now - max(traffic.last_used if traffic.last_used is not None else instance.since, instance.since)
        pools.append(
            budgets.Pool(
                launch_id=launch.id,
                model=instance.model,
                gpus=launch.gpus,
                bundle_bytes=bundle,
                floor_bytes=launch.floor_bytes,
                ceiling_bytes=min(capacity, launch.ceiling_bytes),  # above the start-up total the engine corrupts its KV or dies
                weight=spec.kv_weight * 2.0**spec.priority,
                limit_bytes=seen.segment.limit_bytes,
                used_bytes=seen.segment.used_bytes,
                prealloc_bytes=seen.segment.prealloc_bytes,
                busy=traffic.in_flight > 0,
                idle_s=0.0 if traffic.in_flight else max(0.0, idle_s),
            )
        )
    return pools


def _claims(instances: Mapping[str, Instance], snapshot: Snapshot) -> dict[str, int]:
    """Per GPU: what starts under way will still take, and NVML cannot show yet."""
    claims = dict.fromkeys(snapshot.gpus, 0)
    for instance in instances.values():
        if instance.launch is None or not (instance.state is State.STARTING or instance.reserved):
            continue
        for gpu in instance.launch.gpus:
            if gpu in claims:
                claims[gpu] += _claim(instance, instance.launch, gpu, snapshot)
    return claims


def _claim(instance: Instance, launch: Launch, gpu: str, snapshot: Snapshot) -> int:
    seen = snapshot.engines.get(launch.id)
    if seen is None or seen.segment is None:
        return max(0, launch.claim_bytes + launch.floor_bytes - snapshot.held_bytes(launch.id, gpu))
    return max(0, launch.claim_bytes - (snapshot.held_bytes(launch.id, gpu) - seen.segment.mapped_bytes))


def _admit(
    instances: dict[str, Instance],
    known: Mapping[str, Known],
    pools: list[budgets.Pool],
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
    line = [i for i in instances.values() if i.state is State.WAITING and i.model in known]
    for instance in sorted(line, key=lambda i: (-known[i.model].spec.priority, i.since, i.model)):
        model, now = known[instance.model], snapshot.now
        if instance.reserved and instance.launch:
            for gpu in instance.launch.gpus:
                if gpu in claims:
                    claims[gpu] -= _claim(instance, instance.launch, gpu, snapshot)
        readable = {uuid: gpu for uuid, gpu in snapshot.gpus.items() if gpu.error is None}
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
    ceiling = model.spec.kv_ceiling or max(floor, room - model.footprint.ready_bytes)
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
    pools: list[budgets.Pool],
    planned: budgets.BudgetPlan,
    claims: int,
    snapshot: Snapshot,
    rules: Rules,
) -> GpuBudget:
    here = [p for p in pools if gpu.uuid in p.gpus]
    mapped = sum(p.mapped_bytes for p in here)
    ours = sum(snapshot.held_bytes(i.launch.id, gpu.uuid) for i in instances.values() if i.launch)
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


def _view(pool: budgets.Pool, planned: budgets.BudgetPlan, snapshot: Snapshot) -> PoolView:
    limit = planned.limits.get(pool.launch_id)
    size = limit.limit_bytes if limit else pool.limit_bytes
    reason = limit.reason if limit else "its GPU cannot be read: left as it is"
    if pool.mapped_bytes > size:
        status = "draining"
        reason += f"; {show_bytes(pool.mapped_bytes - size)} above it leave as requests finish"
    elif snapshot.engines[pool.launch_id].acked_limit_bytes == size == pool.limit_bytes:
        status = "applied"
    else:
        status = "unverified"
    return PoolView(pool.least, pool.most, pool.bundle_bytes, size, status, reason)
