"""Whatever state the models are in: claims fit what is seen free, each GPU starts one engine at a time, the accounts add up.

And the order in which things are given is nothing: a plan is a function of what is seen.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from orchestrator.policy.actions import SetLimit, Sleep, Start, Stop, Wake
from orchestrator.policy.admission import reserve_bytes
from orchestrator.policy.decide import Plan, decide
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import HAS_ENGINE, NEXT, Failure, Instance, Launch, State, Then
from orchestrator.policy.lifecycle import Known, Rules
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB, MIB

NOW = 5000.0
RULES = Rules(host_budget_bytes=25 * GIB)
look = settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    known: dict[str, Known]
    instances: dict[str, Instance]
    snapshot: Snapshot

    def plan(self, shuffle: Random | None = None) -> Plan:
        ids = itertools.count()

        def mixed(items: dict[str, T]) -> dict[str, T]:
            pairs = list(items.items())
            if shuffle:
                shuffle.shuffle(pairs)
            return dict(pairs)

        seen = self.snapshot
        snapshot = Snapshot(seen.now, mixed(dict(seen.gpus)), mixed(dict(seen.engines)), mixed(dict(seen.traffic)))
        return decide(mixed(self.known), mixed(self.instances), {}, snapshot, RULES, lambda: f"n{next(ids)}")


@st.composite
def engines(draw: st.DrawFn, key: str, pid: int) -> EngineSeen:
    used = draw(st.integers(0, 40)) * GIB
    segment = draw(st.sampled_from((None, Segment(draw(st.integers(0, 120)) * GIB, used, draw(st.integers(0, 2)) * GIB))))
    alive = draw(st.sampled_from((True, True, True, False)))
    return EngineSeen(
        key,
        alive=alive,
        gone=not alive and draw(st.booleans()),
        ready=draw(st.booleans()),
        error=draw(st.sampled_from((None, None, None, "broken"))),
        adopted=draw(st.booleans()),
        asleep=draw(st.booleans()),
        host_bytes=draw(st.integers(0, 20)) * GIB,
        pids=frozenset({pid}),
        started_at=NOW - 5,
        segment=segment,
        capacity_bytes=draw(st.sampled_from((0, 60 * GIB))),
        bundle_bytes=draw(st.sampled_from((0, 96 * MIB))),
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(1, 3))
    uuids = [f"GPU-{n}" for n in range(count)]
    known: dict[str, Known] = {}
    instances: dict[str, Instance] = {}
    seen: dict[str, EngineSeen] = {}
    traffic: dict[str, TrafficSeen] = {}
    names = [f"m{n}" for n in range(draw(st.integers(1, 6)))]
    for n, name in enumerate(names):
        size = draw(st.integers(1, count)) if draw(st.booleans()) else 1
        spec = ModelSpec(
            name=name,
            source="org/m",
            tensor_parallel_size=size,
            gpus=draw(st.sampled_from(("auto", "auto", tuple(range(count))))),
            priority=draw(st.integers(-1, 1)),
            kv_floor=draw(st.sampled_from((None, 0, 2 * GIB, 30 * GIB))),
            kv_ceiling=draw(st.sampled_from((None, None, 40 * GIB))),
            pinned=not draw(st.integers(0, 5)),
            sleep_level=draw(st.sampled_from((0, 1, 1, 2))),
            sleep_timeout=draw(st.sampled_from((None, 5.0, 300.0))),
            min_residency=draw(st.sampled_from((0.5, 30.0))),
        )
        start = draw(st.integers(2, 60)) * GIB
        bundle = draw(st.sampled_from((0, 96 * MIB)))
        footprint = Footprint("estimated", start_bytes=start, ready_bytes=start - GIB, bundle_bytes=bundle)
        if draw(st.integers(0, 9)):
            known[name] = Known(spec, footprint, held=not draw(st.integers(0, 5)), started_at=draw(st.sampled_from((-1e9, NOW - 1))))
        used = draw(st.sampled_from((None, NOW - 1, NOW - 4000)))
        arrivals = draw(st.sampled_from((0.0, 0.0, 2.0)))
        traffic[name] = TrafficSeen(draw(st.integers(0, 2)), draw(st.integers(0, 2)), used, arrivals=arrivals)
        state = draw(st.sampled_from(tuple(State)))
        reserved = state in (State.WAITING, State.ASLEEP) and draw(st.booleans())
        told = state is State.DRAINING and draw(st.booleans())
        launch = None
        if state in HAS_ENGINE or reserved:
            gpus = tuple(draw(st.permutations(uuids))[:size])
            floor = draw(st.integers(0, 4)) * GIB
            launch = Launch(f"l{n}", f"orch-{name}", spec, gpus, start, floor, draw(st.integers(5, 90)) * GIB)
        if launch and (not reserved or state is State.ASLEEP) and draw(st.integers(0, 9)):
            seen[launch.id] = draw(engines(launch.id, 100 + n))
        failing = state is State.STOPPING and draw(st.booleans())
        failure = Failure("it died", (), NOW - 9, True) if failing else None
        instances[name] = Instance(
            name,
            state,
            NOW - draw(st.sampled_from((0.0, 10.0, 700.0))),
            "as before",
            launch,
            reserved,
            failing=failing,
            failures=draw(st.integers(0, 1)) if not failing else 1,
            failure=failure,
            then=draw(st.sampled_from(tuple(Then))) if state is State.DRAINING and not told else Then.SLEEP if told else Then.STOP,
            sent_at=NOW - draw(st.sampled_from((0.0, 400.0))) if told else None,
            yielded_at=NOW - 20 if state in (State.DRAINING, State.STOPPED, State.ASLEEP) and draw(st.booleans()) else None,
        )
    readings: dict[str, GpuReading] = {}
    for index, uuid in enumerate(uuids):
        free = draw(st.integers(0, 140)) * GIB
        held = {100 + n: draw(st.integers(0, 50)) * GIB for n in range(len(names)) if draw(st.booleans())}
        readings[uuid] = GpuReading(uuid, index, "H200", 140 * GIB, free, held, NOW, draw(st.sampled_from((None, None, None, "hangs"))))
    return World(known, instances, Snapshot(NOW, readings, seen, traffic))


def began(world: World, plan: Plan) -> Sequence[Launch]:
    """Launches that this look started or promised memory to."""
    now = [i for i in plan.instances.values() if i.launch and (i.reserved or i.state is State.STARTING)]
    return [i.launch for i in now if i.launch and (i.reserved or world.instances[i.model].state is not State.STARTING)]


@look
@given(worlds())
def test_claims_of_a_start_fit_what_is_seen_free(world: World) -> None:
    plan = world.plan()
    for action in plan.actions:
        if isinstance(action, Start | Wake):
            launch = action.launch if isinstance(action, Start) else plan.instances[action.model].launch
            assert launch is not None
            for uuid in launch.gpus:
                gpu = world.snapshot.gpus[uuid]
                assert gpu.error is None
                assert plan.gpus[uuid].claims_bytes <= gpu.free_bytes - reserve_bytes(gpu, RULES)


@look
@given(worlds())
def test_a_promise_is_one_that_the_floors_leave_room_for(world: World) -> None:
    plan = world.plan()
    for launch in began(world, plan):
        for uuid in launch.gpus:
            gpu = world.snapshot.gpus[uuid]
            above = 0
            for instance in plan.instances.values():
                if instance.launch and uuid in instance.launch.gpus and (view := plan.pools.get(instance.launch.id)):
                    segment = world.snapshot.engines[instance.launch.id].segment
                    above += (segment.mapped_bytes if segment else 0) - view.floor_bytes
            assert plan.gpus[uuid].claims_bytes <= gpu.free_bytes + above - reserve_bytes(gpu, RULES)


@look
@given(worlds())
def test_one_start_or_promise_a_gpu(world: World) -> None:
    plan = world.plan()
    old = [
        i.launch for n, i in plan.instances.items() if i.state is State.STARTING and i.launch and world.instances[n].state is State.STARTING
    ]
    new = [uuid for launch in began(world, plan) for uuid in launch.gpus]
    assert len(set(new)) == len(new)
    assert not set(new) & {uuid for launch in old for uuid in launch.gpus}
    started = [action.launch for action in plan.actions if isinstance(action, Start)]
    assert len({launch.id for launch in began(world, plan)}) == len(began(world, plan))
    assert all(plan.instances[launch.spec.name].launch == launch for launch in started)


@look
@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_in_which_things_are_given_does_not_matter(world: World, random: Random) -> None:
    assert world.plan(random) == world.plan()


@look
@given(worlds())
def test_every_account_adds_up(world: World) -> None:
    for uuid, budget in world.plan().gpus.items():
        gpu = world.snapshot.gpus[uuid]
        parts = budget.reserve_bytes + budget.foreign_bytes + budget.fixed_bytes + budget.claims_bytes + budget.pool_bytes
        assert parts == budget.total_bytes == gpu.total_bytes
        assert budget.used_bytes == budget.foreign_bytes + budget.fixed_bytes + budget.kv_mapped_bytes
        assert budget.claims_bytes >= 0
        assert budget.fixed_bytes >= 0


@look
@given(worlds())
def test_moves_are_those_of_the_diagram_and_nothing_is_left_without_an_engine(world: World) -> None:
    plan = world.plan()
    for name, before in world.instances.items():
        after = plan.instances.get(name)
        reached = after.state if after else State.STOPPED
        steps = {before.state} | NEXT[before.state]
        steps |= {State.STARTING}  # a model may begin to wait and to start in one look
        steps |= {third for second in steps for third in NEXT[second] if third in (State.WAKING, State.DRAINING, State.STOPPING)}
        assert reached in steps
        if after and after.state in HAS_ENGINE:
            assert after.launch is not None
        elif after:
            assert (after.launch is not None) == after.reserved
        assert name in world.known or after is None or after.state is not State.STOPPED
    assert world.known.keys() <= plan.instances.keys()


@look
@given(worlds())
def test_limits_are_set_on_pools_that_can_be_judged_shrinks_first(world: World) -> None:
    plan = world.plan()
    gpus = {i.launch.id: i.launch.gpus for i in plan.instances.values() if i.launch}
    moves = [action for action in plan.actions if isinstance(action, SetLimit)]
    assert [move.limit_bytes > move.was_bytes for move in moves] == sorted(move.limit_bytes > move.was_bytes for move in moves)
    for move in moves:
        assert all(world.snapshot.gpus[uuid].error is None for uuid in gpus[move.launch_id])
        assert 0 < move.limit_bytes != move.was_bytes
        assert plan.pools[move.launch_id].limit_bytes == move.limit_bytes


def evicted(world: World, plan: Plan) -> list[str]:
    """Models that this look sends away for another one."""
    return [name for name, i in plan.instances.items() if i.yielded_at == NOW and world.instances[name].yielded_at != NOW]


@look
@given(worlds())
def test_nobody_goes_for_another_who_is_pinned_or_came_a_moment_ago(world: World) -> None:
    plan = world.plan()
    for name in evicted(world, plan):
        if name not in world.known or world.known[name].drained_at > 0:
            continue
        event("evicted")
        spec = world.known[name].spec
        before = world.instances[name]
        assert not spec.pinned
        assert before.state is State.ASLEEP or NOW - before.since >= spec.min_residency
        if world.snapshot.traffic[name].in_flight:
            assert plan.instances[name].state is State.DRAINING, "its requests end first"


@look
@given(worlds())
def test_an_engine_with_requests_is_not_told_to_sleep(world: World) -> None:
    for action in world.plan().actions:
        if isinstance(action, Sleep):
            assert world.snapshot.traffic[action.model].in_flight == 0


@look
@given(worlds())
def test_starts_sleeps_and_wakes_of_a_gpu_take_turns(world: World) -> None:
    plan = world.plan()
    moving = [
        gpu
        for instance in plan.instances.values()
        if instance.launch and (instance.state in (State.STARTING, State.WAKING) or instance.sent_at is not None)
        for gpu in instance.launch.gpus
    ]
    before = [
        gpu
        for instance in world.instances.values()
        if instance.launch and (instance.state in (State.STARTING, State.WAKING) or instance.sent_at is not None)
        for gpu in instance.launch.gpus
    ]
    for gpu in set(moving):
        assert moving.count(gpu) <= max(1, before.count(gpu))


@look
@given(worlds())
def test_one_action_an_engine(world: World) -> None:
    told = [action.launch_id for action in world.plan().actions if isinstance(action, Sleep | Wake | Stop)]
    assert len(set(told)) == len(told)
