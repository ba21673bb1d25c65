"""What the loop stands on is away: NVML fails or hangs, a card vanishes, the state file can not be written. Requests go on."""

import logging
import threading

import pytest

from orchestrator.errors import StoreError
from orchestrator.policy.instance import State
from orchestrator.policy.units import GIB
from tests.control.fakes import FakeGpus, spec
from tests.control.world import World, world
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


async def two_busy_models(w: World) -> None:
    """Two models of which one is about to need memory of the other, so that limits would move."""
    await w.ready("a")
    await w.ready("b")
    await w.tick(40)


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_limits_freeze_and_requests_go_on_while_nvml_is_away(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.control.observe.GPU_TIMEOUT_S", 0.02)
    async with world(spec("a"), spec("b"), spec("c")) as w:
        await two_busy_models(w)
        gate = threading.Event()
        w.gpus.error, w.gpus.gate = (OSError("NVML: GPU lost"), None) if how == "fails" else (None, gate)
        try:
            written = [line for line in w.journal if line.startswith("limit")]
            w.engines["a"].use(60 * GIB)
            w.gpus.foreign["GPU-0"] = 30 * GIB
            other = w.request("c")
            await w.tick(10)
            assert [line for line in w.journal if line.startswith("limit")] == written
            assert w.loop.view is not None
            assert ("GPU lost" if how == "fails" else "has not answered") in str(w.loop.view.snapshot.gpus["GPU-0"].error)
            assert w.instance("c").state is State.WAITING
            assert "cannot be read" in w.instance("c").reason

            request = w.request("a")
            await turns()
            assert request.launch_id == w.engines["a"].launch.id
            await request.finish()
        finally:
            w.gpus.error, w.gpus.gate = None, None
            gate.set()
        w.gpus.foreign["GPU-0"] = 0
        w.engines["a"].use(0)
        await w.until("c", State.READY, ticks=200)
        await turns()
        assert other.launch_id == w.engines["c"].launch.id
        assert w.loop.view.snapshot.gpus["GPU-0"].error is None


async def test_a_driver_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.control.observe.GPU_TIMEOUT_S", 0.02)
    async with world(spec("a")) as w:
        before, w.gpus.gate = w.gpus.reads, threading.Event()
        try:
            await w.tick(5)
            assert w.gpus.reads == before + 1
        finally:
            w.gpus.gate.set()


async def test_an_unexpected_failure_of_the_driver_does_not_end_looking() -> None:
    async with world(spec("a")) as w:
        w.gpus.error = ValueError("not JSON")
        with pytest.raises(ValueError, match="not JSON"):
            await w.tick()
        w.gpus.error = None
        await w.tick()
        assert w.loop.view is not None
        assert w.loop.view.snapshot.gpus["GPU-0"].error is None


async def test_a_driver_that_never_answered_starts_nothing_until_it_does() -> None:
    w = World(spec("a", preload=True))
    w.gpus.error = OSError("NVML: Driver Not Loaded")
    await w.registry.load()
    try:
        await w.tick(5)
        assert w.instance("a").state is State.WAITING
        assert not w.engines.all
        w.gpus.error = None
        await w.until("a", State.READY)
    finally:
        await w.close()


async def test_a_card_that_vanishes_keeps_its_engine_and_gets_no_new_one() -> None:
    async with world(spec("a", gpus=[0]), spec("b", gpus=[0]), spec("c"), gpus=FakeGpus(2)) as w:
        request = await w.ready("a")
        w.gpus.missing = {"GPU-0"}
        await w.tick()
        assert w.loop.view is not None
        assert "does not list it" in str(w.loop.view.snapshot.gpus["GPU-0"].error)
        assert w.instance("a").state is State.READY
        w.request("b")
        on_other = w.request("c")
        await w.until("c", State.READY)
        await turns()
        assert on_other.launch_id is not None
        assert w.engines["c"].launch.gpus == ("GPU-1",)
        assert w.instance("b").state is State.WAITING
        assert "cannot be read" in w.instance("b").reason
        w.gpus.missing = set()
        await w.until("b", State.READY)
        await request.finish()


async def test_the_loop_goes_on_while_the_store_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with world(spec("a")) as w:
        w.store.broken = True
        with caplog.at_level(logging.ERROR):
            request = await w.ready("a")
        assert request.launch_id is not None
        assert "could not be kept" in caplog.text
        assert "disk I/O error" in caplog.text
        with pytest.raises(StoreError):
            await w.registry.hold("a", True)
        await w.tick(4)
        assert w.instance("a").state is State.READY  # what was not kept did not happen
        assert w.registry.get("a").footprint.source == "learned"  # a figure is used all the same
        w.store.broken = False
        await request.finish()
        await w.registry.hold("a", True)
        await w.until("a", State.STOPPED)
        assert w.store.held == {"a"}


async def test_a_segment_that_vanishes_under_a_write_is_no_fault_of_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        await w.tick(20)
        w.engines.vanishing.add(w.engines["a"].launch.id)
        w.gpus.foreign["GPU-0"] = 40 * GIB  # limits must shrink now
        with caplog.at_level(logging.WARNING):
            await w.tick()
        assert "not written" in caplog.text
        w.engines.vanishing.clear()
        await w.tick()
        segment = w.engines["a"].segment
        assert segment is not None
        assert segment.limit_bytes < 40 * GIB
        await request.finish()
