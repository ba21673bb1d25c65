"""The loop itself: what it notes, when it looks, and how it ends."""

import asyncio
import logging

import pytest

from orchestrator.errors import ModelUnavailable
from orchestrator.policy.instance import State
from tests.control.fakes import spec
from tests.control.world import world

pytestmark = pytest.mark.asyncio


async def test_one_event_for_each_change_and_none_for_what_stays() -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        kept = len(w.store.kept)
        await w.tick(50)
        assert len(w.store.kept) == kept
        await request.finish()


async def test_notes_of_operators_stand_between_the_states() -> None:
    async with world(spec("a")) as w:
        w.wake.clear()
        w.loop.note("a", "start", "by an operator")
        await w.loop.settle()
        assert w.states("a") == ["start"]
        assert w.wake.is_set()


async def test_run_looks_at_once_when_woken_and_survives_a_tick_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with world(spec("a")) as w:
        await w.ready("a")
        running = asyncio.ensure_future(w.loop.run())
        try:
            w.gpus.error = RuntimeError("a bug")
            with caplog.at_level(logging.ERROR):
                while "failed in this tick" not in caplog.text:
                    w.wake.set()
                    await asyncio.sleep(0)
            w.gpus.error = None
            assert w.loop.view is not None
            ticks = w.loop.view.ticks
            async with asyncio.timeout(20), w.loop.ticked:
                w.wake.set()
                await w.loop.ticked.wait_for(lambda: w.loop.view is not None and w.loop.view.ticks > ticks)
            assert w.loop.view.errors >= 1
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_stop_refuses_new_requests_drains_and_ends_every_engine() -> None:
    async with world(spec("a"), spec("b")) as w:
        request = await w.ready("a")
        await (await w.ready("b")).finish()
        w.loop.stop()
        await w.tick()
        with pytest.raises(ModelUnavailable) as refused:
            await w.request("a").task
        assert refused.value.code == "shutting_down"
        await w.tick(5)
        assert w.instance("a").state is State.DRAINING
        assert [e.launch.spec.name for e in w.engines.all.values()] == ["a"]
        await request.finish()
        await w.tick(4)
        assert w.loop.view is not None
        assert not w.loop.view.plan.instances
        assert not w.engines.all
        async with asyncio.timeout(20):
            await w.loop.run()  # there is nothing left to wait for
