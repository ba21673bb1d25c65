"""Whatever state the models are in: limits leave the reserve and the claims alone, and only who serves is trimmed or repaired."""

import itertools
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st

from orchestrator.policy.actions import Repair, SetLimit, Trim
from orchestrator.policy.decide import decide
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.snapshot import Snapshot, TrafficSeen
from tests.policy.test_decide_properties import RULES, World, look, worlds


@st.composite
def serving(draw: st.DrawFn) -> World:
    """Most engines serve or start; some of them are idle, for a moment or for long."""
    world: World = draw(worlds())
    seen = world.snapshot
    instances, engines, traffic = dict(world.instances), dict(seen.engines), dict(seen.traffic)
    for name, instance in world.instances.items():
        if instance.launch and (engine := engines.get(instance.launch.id)) and draw(st.integers(0, 4)):
            state = draw(st.sampled_from((State.READY, State.READY, State.STARTING)))
            instances[name] = Instance(name, state, seen.now - 400.0, "as before", instance.launch)
            engines[engine.launch_id] = replace(engine, alive=True, gone=False, ready=state is not State.STARTING, error=None, asleep=False)
            idle_s = draw(st.sampled_from((0.25, 0.5, 9.9, 10.0, 300.0)))
            traffic[name] = TrafficSeen(in_flight=draw(st.sampled_from((0, 0, 1))), last_used=seen.now - idle_s)
    return World(world.known, instances, replace(seen, engines=engines, traffic=traffic))


@settings(look, max_examples=150)
@given(worlds())
def test_limits_fit_beside_the_reserve_and_what_is_claimed(world: World) -> None:
    """On each GPU that can be read, where the floors fit and nobody spans one that cannot."""
    plan = world.plan()
    for uuid, gpu in world.snapshot.gpus.items():
        launches = [i.launch for i in plan.instances.values() if i.launch and i.launch.id in plan.pools and uuid in i.launch.gpus]
        if any(world.snapshot.gpus[other].error for launch in launches for other in launch.gpus):
            continue
        segments = [world.snapshot.engines[launch.id].segment for launch in launches]
        mapped = sum(segment.mapped_bytes for segment in segments if segment)
        amount = gpu.free_bytes + mapped - plan.gpus[uuid].reserve_bytes - plan.gpus[uuid].claims_bytes
        views = [plan.pools[launch.id] for launch in launches]
        if gpu.error is None and views and sum(view.floor_bytes for view in views) <= amount:
            event("fits beside a claim" if plan.gpus[uuid].claims_bytes else "fits")
            assert sum(view.limit_bytes for view in views) <= amount


@look
@given(serving())
def test_no_limit_moves_on_an_old_reading(world: World) -> None:
    plan = world.plan()
    gpus = {i.launch.id: i.launch.gpus for i in plan.instances.values() if i.launch}
    for move in plan.actions:
        if isinstance(move, SetLimit):
            assert [world.snapshot.gpus[uuid].error for uuid in gpus[move.launch_id]] == [None] * len(gpus[move.launch_id])


@look
@given(worlds())
def test_no_limit_is_above_what_its_engine_can_address(world: World) -> None:
    plan = world.plan()
    launches = {i.launch.id: i.launch for i in plan.instances.values() if i.launch}
    for move in plan.actions:
        if isinstance(move, SetLimit):
            launch, seen = launches[move.launch_id], world.snapshot.engines[move.launch_id]
            assert move.limit_bytes <= min(launch.ceiling_bytes, seen.capacity_bytes or launch.ceiling_bytes)


@settings(look, max_examples=100)
@given(serving())
def test_who_is_trimmed_serves_nobody_and_is_trimmed_once(world: World) -> None:
    """And whoever was idle for all of its idle_trim is, also where somebody lacks memory."""
    seen = world.snapshot
    plan = world.plan()
    trims = [action for action in plan.actions if isinstance(action, Trim)]
    for trim in trims:
        traffic = seen.traffic.get(trim.model, TrafficSeen())
        assert traffic.in_flight + traffic.waiting == 0
        assert plan.instances[trim.model].state is State.READY
    for name, instance in plan.instances.items():
        traffic = seen.traffic.get(name, TrafficSeen())
        idle_s = seen.now - max(traffic.last_used if traffic.last_used is not None else instance.since, instance.since)
        model = world.known.get(name)
        if instance.state is not State.READY or traffic.in_flight + traffic.waiting or model is None or model.spec.idle_trim is None:
            continue
        if instance.launch and instance.launch.id in plan.pools and idle_s >= max(0.5, model.spec.idle_trim):
            event("due")
            assert [trim.launch_id for trim in trims].count(instance.launch.id) == 1
    later = Snapshot(seen.now + 0.25, seen.gpus, seen.engines, seen.traffic)
    ids = itertools.count(1000)
    again = decide(world.known, plan.instances, plan.pool_memory, later, RULES, lambda: f"n{next(ids)}")
    assert not {trim.launch_id for trim in trims} & {action.launch_id for action in again.actions if isinstance(action, Trim)}


@look
@given(worlds() | serving())
def test_a_segment_is_made_anew_for_those_that_serve_and_lost_it_and_for_nobody_else(world: World) -> None:
    """An engine that starts has none yet, and one that ends removes its own."""
    plan = world.plan()
    serving = [i.launch.id for i in plan.instances.values() if i.launch and i.state is State.READY]
    lost = {key for key in serving if (seen := world.snapshot.engines.get(key)) and seen.ready and seen.segment is None}
    event(f"{len(lost)} lost")
    repairs = [action.launch_id for action in plan.actions if isinstance(action, Repair)]
    assert sorted(repairs) == sorted(lost)
