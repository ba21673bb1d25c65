"""Who may start or wake now, and who goes for it: the line of those that wait for memory, one at a time.

Three steps. Make room: where it does not fit beside everybody's floor, residency.py says who leaves for it. Reserve: it fits, so its
bytes are claimed and the others' limits make room. Go: those bytes are seen free. One start, sleep or wake at a time on a GPU.
A claim that nobody can honour any more (a foreign process came) is given up in the next look.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from orchestrator.policy import residency
from orchestrator.policy.actions import Action, Sleep, Start, Stop, Wake
from orchestrator.policy.division import Pool
from orchestrator.policy.footprint import floor_bytes
from orchestrator.policy.instance import Instance, Launch, State, Then
from orchestrator.policy.lifecycle import Known, Rules, Want, wanted
from orchestrator.policy.model import slug
from orchestrator.policy.placement import Placed, allowed, place, pressures, sets
from orchestrator.policy.residency import Eviction, choose, over_host_budget, rather_stops
from orchestrator.policy.resident import Aging, Resident, Waiter, has_slept, resident_of
from orchestrator.policy.snapshot import GpuReading, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB, show_bytes

KV_HEADROOM = 0.02  # kvcached stops mapping when less of the card is free (we set KVCACHED_GPU_UTILIZATION=0.98)
REQUEST_TOKENS = 1000  # of a usual request, where only their number is known


def reserve_bytes(gpu: GpuReading, rules: Rules) -> int:
    """Kept free on each GPU: activations peak together, and other processes come without asking."""
    if rules.reserve_bytes is not None:
        return rules.reserve_bytes
    return max(int(0.03 * gpu.total_bytes), int(KV_HEADROOM * gpu.total_bytes) + GIB // 2)


def claims_of(instances: Mapping[str, Instance], known: Mapping[str, Known], snapshot: Snapshot) -> dict[tuple[str, str], int]:
    """(model, GPU) -> what starts and wakes under way will still take there, and NVML cannot show yet."""
    return {
        (i.model, gpu): _claim(i, i.launch, known.get(i.model), gpu, snapshot)
        for i in instances.values()
        if i.launch is not None and (i.state in (State.STARTING, State.WAKING) or i.reserved)
        for gpu in i.launch.gpus
    }


def _claim(instance: Instance, launch: Launch, model: Known | None, gpu: str, snapshot: Snapshot) -> int:
    seen, held = snapshot.engines.get(launch.id), snapshot.held_bytes(launch.id, gpu)
    if seen is None or seen.segment is None:
        return max(0, launch.claim_bytes + launch.floor_bytes - held)
    fixed = held - seen.segment.mapped_bytes
    if instance.state is State.STARTING or model is None:
        return max(0, launch.claim_bytes - fixed)
    more = launch.floor_bytes - seen.bundle_bytes if instance.state is State.ASLEEP else 0  # a sleeper's pool has no floor yet
    return max(0, model.footprint.ready_bytes - fixed) + max(0, more)


@dataclass
class Admission:
    """One look's line. `claims`: (model, GPU) -> promised bytes, which the budgets leave alone; it changes as the line is served."""

    instances: dict[str, Instance]
    known: Mapping[str, Known]
    pools: list[Pool]
    claims: dict[tuple[str, str], int]
    snapshot: Snapshot
    rules: Rules
    launch_id: Callable[[], str]
    actions: list[Action]
    aging: Aging

    def __post_init__(self) -> None:
        self.readable = {uuid: gpu for uuid, gpu in self.snapshot.gpus.items() if gpu.error is None}
        self.taken = {gpu for i in self.instances.values() if _moving(i) and i.launch for gpu in i.launch.gpus}
        self.promised = dict.fromkeys(self.snapshot.gpus, 0)  # to those ahead in line, of bytes that are still on their way
        self.kept: dict[str, str] = {}
        self.leaving: list[residency.Victim] = []  # those that go now, by this look's word
        pools = {pool.launch_id: pool for pool in self.pools}
        found = (resident_of(i, self.known.get(i.model), pools, self.snapshot) for i in self.instances.values())
        self.residents: tuple[Resident, ...] = tuple(r for r in found if r is not None)
        self.aging = self.aging.seen(self.residents)
        self.coming = {
            gpu: sum(r.frees(r.leaving) for r in self.residents if gpu in r.gpus) if self.residents else 0 for gpu in self.readable
        }

    def run(self) -> None:
        self._put_to_sleep()
        found = [(self._waiter(i), i) for i in self.instances.values() if self._waits(i)]
        line = sorted(found, key=lambda each: (each[0].turn, each[0].model))
        for at, (waiter, instance) in enumerate(line):
            if self.instances[instance.model] is instance:  # else it was sent away for one ahead of it
                self._serve(waiter, instance, [behind for behind, _ in line[at + 1 :]])
        for victim in over_host_budget(self.residents, self.rules.host_budget_bytes, self.aging, self.snapshot.now):
            self._leave(victim)

    def claimed(self, gpu: str) -> int:
        return sum(size for (_, where), size in self.claims.items() if where == gpu)

    # ---- the line -------------------------------------------------------------------------------------------------

    def _waits(self, instance: Instance) -> bool:
        model = self.known.get(instance.model)
        if model is None or instance.state not in (State.WAITING, State.ASLEEP):
            return False
        traffic = self.snapshot.traffic.get(instance.model, TrafficSeen())
        return instance.state is State.WAITING or wanted(model, traffic, instance, self.snapshot.now)[0] is Want.READY

    def _waiter(self, instance: Instance) -> Waiter:
        model, launch = self.known[instance.model], instance.launch
        floor = floor_bytes(model.spec, model.footprint)
        if instance.state is State.ASLEEP and launch is not None:
            need = max((_claim(instance, launch, model, gpu, self.snapshot) for gpu in launch.gpus), default=0)
            since = self.snapshot.traffic.get(instance.model, TrafficSeen()).waiting_since
            since = since if since is not None else max(model.started_at, instance.since)
            return Waiter(instance.model, need, (launch.gpus,), since, model.spec.priority)
        return Waiter(
            instance.model,
            model.footprint.start_bytes + floor,
            sets(model.spec, self.snapshot.gpus),
            instance.since,
            model.spec.priority,
        )

    def _serve(self, waiter: Waiter, instance: Instance, behind: Sequence[Waiter]) -> None:
        if instance.reserved and instance.launch:  # judged anew
            for gpu in instance.launch.gpus:
                self.claims.pop((instance.model, gpu), None)
        room = {
            uuid: gpu.free_bytes
            + sum(p.mapped_bytes - p.least for p in self.pools if uuid in p.gpus)
            - reserve_bytes(gpu, self.rules)
            - self.claimed(uuid)
            - self.promised[uuid]
            for uuid, gpu in self.readable.items()
        }
        gpus, _ = self._somewhere(waiter, instance, room, self.taken | self.kept.keys())
        if gpus is not None:
            self._reserve(waiter, instance, gpus)
        elif self._somewhere(waiter, instance, room, self.kept.keys())[0] is not None:
            self._stay(instance, "another engine starts or wakes on its GPU")
        elif unreadable := self._unreadable(instance):
            self._stay(instance, unreadable)
        else:
            self._make_room(waiter, instance, behind, room, self._somewhere(waiter, instance, room, frozenset())[1])

    def _somewhere(
        self, waiter: Waiter, instance: Instance, room: Mapping[str, int], besides: Set[str]
    ) -> tuple[tuple[str, ...] | None, str]:
        """GPUs where it fits, none of `besides`, or None and why."""
        free = {uuid: size for uuid, size in room.items() if uuid not in besides}
        if instance.state is State.ASLEEP:
            (gpus,) = waiter.places
            return (gpus if all(free.get(gpu, -1) >= waiter.need_bytes for gpu in gpus) else None), ""
        rates = {gpu: sum(self._rate(r) for r in self.residents if gpu in r.gpus and not r.asleep) for gpu in room}
        pressure = pressures(rates, room, waiter.need_bytes) if any(rates.values()) else None
        placed = place(self.known[instance.model].spec, waiter.need_bytes, free, self.readable, pressure)
        return (placed.gpus, "") if isinstance(placed, Placed) else (None, placed.reason)

    def _rate(self, resident: Resident) -> float:
        """KV bytes a second that its requests take."""
        model = self.known.get(resident.model)
        return resident.arrivals * REQUEST_TOKENS * model.footprint.kv_token_bytes if model else 0.0

    def _reserve(self, waiter: Waiter, instance: Instance, gpus: tuple[str, ...]) -> None:
        now, need = self.snapshot.now, waiter.need_bytes
        self.residents = Eviction(waiter.model, gpus, (), self.aging).after(self.residents)  # one that wakes is not sent away again
        free = {gpu: self.readable[gpu].free_bytes - reserve_bytes(self.readable[gpu], self.rules) - self.claimed(gpu) for gpu in gpus}
        self.taken.update(gpus)
        self.claims |= {(waiter.model, gpu): need for gpu in gpus}
        if not all(size >= need for size in free.values()):
            reason = f"{show_bytes(need)} are promised to it; others are giving them back"
            launch = instance.launch if instance.state is State.ASLEEP else self._launch(instance.model, gpus)
            self.instances[instance.model] = replace(instance, reserved=True, launch=launch, reason=reason)
        elif instance.state is State.ASLEEP and instance.launch:
            reason = wanted(self.known[instance.model], self.snapshot.traffic.get(instance.model, TrafficSeen()), instance, now)[1]
            self.instances[instance.model] = instance.to(State.WAKING, now, reason, reserved=False)
            self.actions.append(Wake(instance.launch.id, instance.model, reason))
        else:
            where = ", ".join(str(self.readable[uuid].index) for uuid in gpus)
            reason = f"{instance.reason}; the {show_bytes(need)} that it needs are free on GPU {where}"
            launch = self._launch(instance.model, gpus)
            self.instances[instance.model] = instance.to(State.STARTING, now, reason, launch=launch, reserved=False, peak_bytes=0)
            self.actions.append(Start(launch, reason))

    def _make_room(self, waiter: Waiter, instance: Instance, behind: Sequence[Waiter], room: Mapping[str, int], why: str) -> None:
        answer = choose(waiter, room, self.residents, self.aging, self.rules.host_budget_bytes, self.snapshot.now, self.kept, behind)
        if not isinstance(answer, Eviction):
            self.kept |= dict.fromkeys(answer.keep, waiter.model)
            said = "; ".join(part for part in (why, answer.reason) if part)
            return self._stay(instance, said, retry_at=answer.retry_at or 0.0)
        self.aging = answer.aging
        self.residents = answer.after(self.residents)
        for victim in answer.victims:
            self._leave(victim)
            for gpu in self.coming.keys() & set(victim.gpus):
                self.coming[gpu] += victim.frees_bytes
        for gpu in answer.gpus:  # the budgets leave alone what is not covered by those who leave
            covered = min(waiter.need_bytes, max(0, self.coming[gpu]))
            self.coming[gpu] -= covered
            self.claims[waiter.model, gpu] = waiter.need_bytes - covered
            self.promised[gpu] += covered
        leaving = sorted(r.model for r in self.residents if r.leaving and not set(r.gpus).isdisjoint(answer.gpus))
        self._stay(instance, f"{show_bytes(waiter.need_bytes)} are on their way: {', '.join(leaving) or 'others'} make room")

    def _stay(self, instance: Instance, reason: str, retry_at: float = 0.0) -> None:
        launch = instance.launch if instance.state is State.ASLEEP else None
        self.instances[instance.model] = replace(instance, reserved=False, launch=launch, reason=reason, retry_at=retry_at)

    def _unreadable(self, instance: Instance) -> str | None:
        gpus = self.snapshot.gpus
        candidates, unknown = allowed(self.known[instance.model].spec, gpus)
        if unknown:
            return f"no GPU here is {', '.join(map(str, unknown))}"
        if not candidates or not all(uuid in self.readable for uuid in candidates):
            return "its GPUs cannot be read: " + "; ".join(str(gpus[u].error) for u in candidates if u not in self.readable)
        return None

    # ---- those who go ---------------------------------------------------------------------------------------------

    def _leave(self, victim: residency.Victim) -> None:
        instance, now = self.instances[victim.model], self.snapshot.now
        self.leaving.append(victim)
        if instance.state is State.ASLEEP and instance.launch:
            self.instances[victim.model] = instance.to(State.STOPPING, now, victim.reason, yielded_at=now)
            self.actions.append(Stop(instance.launch.id, victim.model, victim.reason))
        elif instance.state is State.READY:
            then = Then.SLEEP if victim.how == "sleep" else Then.STOP
            self.instances[victim.model] = instance.to(State.DRAINING, now, victim.reason, then=then, yielded_at=now)

    def _put_to_sleep(self) -> None:
        for instance in list(self.instances.values()):
            launch, traffic = instance.launch, self.snapshot.traffic.get(instance.model, TrafficSeen())
            if instance.state is not State.DRAINING or instance.then is not Then.SLEEP or instance.sent_at is not None or launch is None:
                continue
            budget = self.rules.host_budget_bytes
            if rather_stops(launch.id, self.residents, budget, self.aging, self.snapshot.now):
                reason = f"{instance.reason}; asleep it would take more host memory than sleepers may have"
                self.instances[instance.model] = replace(instance, then=Then.STOP, reason=reason)
                self.residents = tuple(replace(r, leaving="stop") if r.launch_id == launch.id else r for r in self.residents)
                continue
            more = sum(max(0, r.host_bytes - r.host_held_bytes) for r in self.residents if r.launch_id == launch.id)
            if sum(r.host_held_bytes for r in self.residents) + more > budget:
                continue  # those that stop for it still hold theirs
            if traffic.in_flight or not self.taken.isdisjoint(launch.gpus):
                continue
            held = max((self.snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus), default=0)
            self.taken.update(launch.gpus)
            slept = has_slept(self.snapshot.engines.get(launch.id))
            self.instances[instance.model] = replace(instance, sent_at=self.snapshot.now, held_bytes=held, slept=slept)
            model = self.known.get(instance.model)
            level = max(1, (model.spec if model else launch.spec).sleep_level)
            self.actions.append(Sleep(launch.id, instance.model, level, instance.reason))

    def _launch(self, name: str, gpus: tuple[str, ...]) -> Launch:
        model = self.known[name]
        claim, floor, fresh_id = model.footprint.start_bytes, floor_bytes(model.spec, model.footprint), self.launch_id()
        room = min(self.readable[uuid].total_bytes - reserve_bytes(self.readable[uuid], self.rules) for uuid in gpus)
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


def _moving(instance: Instance) -> bool:
    """A start, a wake, or a sleep that is under way."""
    return instance.state in (State.STARTING, State.WAKING) or instance.sent_at is not None
