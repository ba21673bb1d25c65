"""The loop over a whole small world, tick by tick: what becomes of a model, from the first request to the last byte.

Nothing here knows how a decision is made; it checks what users and operators would see.
"""

import pytest

from orchestrator.errors import ModelNotFound, ModelUnavailable
from orchestrator.policy.instance import State
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.units import GIB
from tests.control.fakes import BUNDLE, CARD, FakeGpus, spec
from tests.control.world import World, world
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


async def fill(w: World, model: str) -> None:
    """Its requests take all that its limit lets them, and that limit grows to all that there is."""
    for _ in range(20):
        w.engines[model].use(CARD)
        await w.tick()


async def test_a_request_wakes_a_stopped_model_and_is_answered() -> None:
    async with world(spec("a")) as w:
        await w.tick(8)
        assert w.instance("a").state is State.STOPPED
        assert not w.engines.all

        request = w.request("a")
        await turns()
        assert w.traffic.wakes == 1  # the loop need not wait for its interval
        await w.until("a", State.READY)
        await turns()
        assert request.launch_id == w.engines["a"].launch.id
        await request.finish()
        assert w.states("a") == ["starting", "ready"]  # it did not have to wait


async def test_add_goes_through_every_state_and_the_door_opens_after_the_limit_was_written() -> None:
    async with world(spec("a")) as w:
        first = await w.ready("a")
        await fill(w, "a")

        await w.add("b", kv_weight=3)
        seen: list[State] = []
        for count in range(80):
            if count == 8:
                w.engines["a"].use(20 * GIB)
            await w.tick()
            state = w.instance("b").state
            if not seen or seen[-1] is not state:
                seen.append(state)
            if state is State.READY:
                break
        assert seen == [State.WAITING, State.STARTING, State.READY]

        before_open = w.journal[: w.journal.index("open b")]
        assert "limit b" in before_open
        a, b = w.engines["a"].segment, w.engines["b"].segment
        assert a is not None
        assert b is not None
        fixed = w.engines["a"].fixed_bytes + w.engines["b"].fixed_bytes
        assert max(a.limit_bytes, a.mapped_bytes) + b.limit_bytes + fixed + 2 * BUNDLE < CARD  # what both may take, exists
        await first.finish()


async def test_a_start_makes_those_who_hold_the_card_give_way_first() -> None:
    async with world(spec("a")) as w:
        held = await w.ready("a")
        await fill(w, "a")
        await w.add("b")
        await w.tick()
        await w.tick()
        assert w.instance("b").state is State.WAITING
        assert "others are giving them back" in w.instance("b").reason
        limit = w.engines["a"].segment
        assert limit is not None
        assert limit.limit_bytes < limit.used_bytes  # told to shrink, and not started before it has
        await w.tick(10)
        assert "start b" not in w.journal
        w.engines["a"].use(10 * GIB)
        await w.until("b", State.READY)
        await held.finish()


async def test_stop_holds_a_model_down_until_start() -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        await w.registry.hold("a", True)
        await w.tick()
        assert w.instance("a").state is State.DRAINING  # the running request may finish
        with pytest.raises(ModelUnavailable, match="orchestratorctl start a"):
            await w.request("a").task
        await w.tick(4)
        assert w.instance("a").state is State.DRAINING
        await request.finish()
        await w.until("a", State.STOPPED)
        with pytest.raises(ModelUnavailable) as refused:
            await w.request("a").task
        assert refused.value.code == "model_stopped"
        await w.tick(8)
        assert w.instance("a").state is State.STOPPED

        await w.registry.hold("a", False)
        await w.until("a", State.READY)


async def test_start_while_draining_keeps_the_same_engine() -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        await w.registry.hold("a", True)
        await w.tick()
        await w.registry.hold("a", False)
        await w.tick()
        assert w.instance("a").state is State.READY
        assert w.journal.count("start a") == 1
        await request.finish()


async def test_a_drain_that_takes_too_long_is_cut() -> None:
    async with world(spec("a"), rules=Rules(drain_timeout_s=10)) as w:
        await w.ready("a")
        await w.registry.hold("a", True)
        await w.tick(39)
        assert w.instance("a").state is State.DRAINING
        await w.tick(4)
        assert w.instance("a").state in (State.STOPPING, State.STOPPED)
        assert "1 requests cut after 10s" in [e for e in w.store.kept if e.kind == "stopping"][-1].reason


async def test_idle_models_are_stopped_and_pinned_ones_are_not() -> None:
    async with world(spec("a", idle_timeout="60s"), spec("p", idle_timeout="60s", pinned=True)) as w:
        for name in ("a", "p"):
            await (await w.ready(name)).finish()
        await w.tick(220)
        assert w.instance("a").state is State.READY
        await w.tick(30)
        assert w.instance("a").state is State.STOPPED
        assert "idle for 60s" in w.instance("a").reason
        assert w.instance("p").state is State.READY
        assert [e.launch.spec.name for e in w.engines.all.values()] == ["p"]


async def test_a_long_request_is_not_idleness() -> None:
    async with world(spec("a", idle_timeout="60s")) as w:
        request = await w.ready("a")
        await w.tick(400)
        assert w.instance("a").state is State.READY
        await request.finish()
        await w.tick(100)
        assert w.instance("a").state is State.READY  # counted from the end of the request


async def test_rm_while_busy_drains_and_then_nothing_is_left() -> None:
    async with world(stored=[spec("a")]) as w:
        request = await w.ready("a")
        launch = w.engines["a"].launch.id
        await w.registry.remove("a")
        await w.tick(4)
        assert w.instance("a").state is State.DRAINING
        with pytest.raises(ModelNotFound):
            await w.request("a").task
        await request.finish()
        for _ in range(20):
            await w.tick()
        assert w.loop.view is not None
        assert "a" not in w.loop.view.plan.instances
        assert "a" not in w.traffic.seen()
        assert launch not in w.engines.all
        assert w.engines.forgotten == [launch]


async def test_rm_of_a_waiting_model_refuses_who_waits() -> None:
    async with world(stored=[spec("a")], gpus=FakeGpus(total_bytes=CARD)) as w:
        w.gpus.foreign["GPU-0"] = CARD
        request = w.request("a")
        await w.tick(2)
        assert w.instance("a").state is State.WAITING
        await w.registry.remove("a")
        await w.tick(2)
        with pytest.raises(ModelNotFound, match="removed"):
            await request.task


async def test_removed_and_added_again_at_once_gets_a_new_engine() -> None:
    async with world(stored=[spec("a")]) as w:
        request = await w.ready("a")
        first = w.engines["a"].launch.id
        await w.registry.remove("a")
        await w.add("a", args=["--max-model-len", "8k"])
        await w.tick()
        await request.finish()
        await w.until("a", State.STOPPING)
        await w.until("a", State.READY)
        assert w.engines["a"].launch.id != first
        assert w.engines["a"].launch.spec.args == ("--max-model-len", "8k")


async def test_too_little_memory_waits_with_the_arithmetic_and_starts_when_it_is_back() -> None:
    async with world(spec("a")) as w:
        w.gpus.foreign["GPU-0"] = 76 * GIB
        request = w.request("a")
        await w.tick(10)
        assert w.instance("a").state is State.WAITING
        assert "it needs" in w.instance("a").reason
        assert "GPU 0 has" in w.instance("a").reason
        w.gpus.foreign["GPU-0"] = 0
        await w.until("a", State.READY)
        await request.finish()


async def test_a_request_that_leaves_while_its_model_waits_lets_it_be() -> None:
    async with world(spec("a")) as w:
        w.gpus.foreign["GPU-0"] = CARD
        request = w.request("a")
        await w.tick(2)
        assert w.instance("a").state is State.WAITING
        await request.cancel()
        await w.tick(2)
        assert w.instance("a").state is State.STOPPED


async def test_one_start_at_a_time_on_a_card() -> None:
    async with world(spec("a", preload=True), spec("b", preload=True)) as w:
        await w.until("a", State.STARTING)
        await w.tick()
        assert w.instance("b").state is State.WAITING
        assert "another engine starts or wakes" in w.instance("b").reason
        await w.until("b", State.READY)
        assert w.instance("a").state is State.READY


async def test_memory_of_a_dead_engine_is_nobodys_until_the_driver_shows_it_free() -> None:
    async with world(spec("a"), spec("b")) as w:
        request = await w.ready("a")
        engine = w.engines["a"]
        await request.finish()
        await w.registry.hold("a", True)
        await w.until("a", State.STOPPING)
        w.gpus.lingering[engine.pid] = ("GPU-0", 10 * GIB)
        await w.tick(8)
        assert w.instance("a").state is State.STOPPING  # 4 s on an H200
        del w.gpus.lingering[engine.pid]
        await w.tick()
        assert w.instance("a").state is State.STOPPED


async def test_what_a_start_has_shown_is_kept() -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        footprint = w.registry.get("a").footprint
        assert footprint.source == "learned"
        assert footprint.start_bytes > footprint.ready_bytes > 0
        assert w.store.footprints == {
            spec("a").footprint_key(): {
                "start_bytes": footprint.start_bytes,
                "ready_bytes": footprint.ready_bytes,
                "start_s": footprint.start_s,
            }
        }
        await request.finish()
