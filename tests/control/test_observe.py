"""One look: of two looks at a segment the smaller use counts, a segment that vanished stays what it was, and one thread reads the GPUs."""

import asyncio
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.observe import Observer
from orchestrator.policy.instance import Launch
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment
from orchestrator.policy.units import GIB
from tests.control.fakes import Clock, FakeEngine, FakeEngines, FakeGpus, spec
from tests.support.eventually import eventually

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]
WAS = Segment(50 * GIB, 2 * GIB, GIB)


class Cards(FakeGpus):
    """`meanwhile` happens while they are read: between the two looks at the segments. `instead` of what there is, they are these."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)
    instead: Sequence[GpuReading] | None = None

    def read(self) -> Sequence[GpuReading]:
        self.meanwhile()
        return super().read() if self.instead is None else self.instead


class Scene:
    def __init__(self) -> None:
        self.gpus, clock = Cards(), Clock()
        self.engine = FakeEngine(Launch("l1", "ipc", spec(), ("GPU-0",), 0, 0, 80 * GIB), 100, 0.0, ready=True, segment=WAS)
        self.gpus.engines["l1"] = self.engine
        self.observer = Observer(self.gpus, FakeEngines(self.gpus, clock), dict, clock)

    def becomes(self, segment: Segment | None) -> Callable[[], None]:
        return lambda: setattr(self.engine, "segment", segment)

    async def look(self) -> EngineSeen:
        return (await self.observer.look()).engines["l1"]


# ---- segments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "counts"),
    [
        (Segment(40 * GIB, 3 * GIB, GIB), Segment(40 * GIB, 2 * GIB, GIB)),  # it grew while the GPU was read: that may not be in there
        (Segment(40 * GIB, GIB, GIB), Segment(40 * GIB, GIB, GIB)),
        (Segment(50 * GIB, GIB, 2 * GIB), Segment(50 * GIB, GIB, 2 * GIB)),
        (WAS, WAS),
    ],
)
async def test_of_two_looks_the_smaller_use_counts_and_the_later_limit(now: Segment, counts: Segment) -> None:
    scene = Scene()
    scene.gpus.meanwhile = scene.becomes(now)
    assert (await scene.look()).segment == counts


async def test_a_segment_that_vanished_stays_what_it_was_until_there_is_one_again() -> None:
    scene = Scene()
    assert (await scene.look()).segment_lost is False
    scene.engine.hidden = True
    for _ in range(3):
        seen = await scene.look()
        assert (seen.segment, seen.segment_lost) == (WAS, True)
    scene.engine.hidden, scene.engine.segment = False, Segment(9 * GIB, GIB, 0)
    seen = await scene.look()
    assert (seen.segment, seen.segment_lost) == (Segment(9 * GIB, GIB, 0), False)


async def test_one_that_vanishes_between_the_two_looks_too() -> None:
    scene = Scene()
    await scene.look()
    scene.gpus.meanwhile = scene.becomes(None)
    seen = await scene.look()
    assert (seen.segment, seen.segment_lost) == (WAS, True)


async def test_what_was_never_seen_is_lost_and_unknown() -> None:
    scene = Scene()
    scene.engine.hidden = True
    seen = await scene.look()
    assert (seen.segment, seen.segment_lost) == (None, True)


@pytest.mark.parametrize("how", ["not ready yet", "gone"])
async def test_an_engine_without_a_pool_has_lost_none(how: str) -> None:
    scene = Scene()
    scene.engine.ready = how == "gone"
    await scene.look()
    scene.engine.segment, scene.engine.gone = None, how == "gone"
    seen = await scene.look()
    assert (seen.segment, seen.segment_lost) == (None, False)


# ---- the GPUs -------------------------------------------------------------------------------------------------------


async def test_a_card_that_can_not_be_read_keeps_its_figures_and_its_age_and_says_why() -> None:
    scene = Scene()
    before = (await scene.observer.look()).gpus["GPU-0"]
    lost = replace(before, free_bytes=0, error="NVML: GPU is lost", read_at=99.0)
    scene.gpus.instead = [lost]
    after = (await scene.observer.look()).gpus["GPU-0"]
    assert after == replace(before, error="NVML: GPU is lost")
    assert after.read_at == before.read_at


async def test_a_driver_that_hangs_holds_up_one_look_and_keeps_the_reason_that_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.control.observe.GPU_TIMEOUT_S", 1.0)
    scene, gate = Scene(), threading.Event()
    await scene.observer.look()
    scene.gpus.error = OSError("NVML: its process was killed by SIGSEGV")
    await scene.observer.look()
    scene.gpus.error, scene.gpus.gate = None, gate
    took = []
    try:
        for _ in range(4):
            began = asyncio.get_running_loop().time()
            card = (await scene.observer.look()).gpus["GPU-0"]
            took.append(asyncio.get_running_loop().time() - began)
            assert card.error == "NVML: its process was killed by SIGSEGV"  # it is being started anew: that says why
    finally:
        gate.set()
    assert took[0] > 0.9
    assert max(took[1:]) < 0.5
    scene.gpus.gate = None

    async def fresh() -> bool:
        return (await scene.observer.look()).gpus["GPU-0"].error is None

    async with asyncio.timeout(30):
        while not await fresh():
            pass


async def test_each_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    scene = Scene()
    for error in (None, None, "NVML: one", "NVML: one", "NVML: two", None, None):
        scene.gpus.error = OSError(error) if error else None
        await scene.observer.look()
    assert caplog.messages == [
        "GPU 0: its figures are old, and limits stay as they are: NVML: one",
        "GPU 0: its figures are old, and limits stay as they are: NVML: two",
        "GPU 0 is read again",
    ]


# ---- the thread -----------------------------------------------------------------------------------------------------


async def test_one_thread_reads_the_gpus_and_ends_with_its_observer() -> None:
    threads: set[threading.Thread] = set()
    scene = Scene()
    scene.gpus.meanwhile = lambda: threads.add(threading.current_thread())
    for _ in range(20):
        await scene.look()
    (thread,) = threads
    assert thread is not threading.main_thread()
    del scene
    await eventually(lambda: not thread.is_alive(), "it has ended")


async def test_an_answer_that_comes_when_nobody_waits_any_more_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop that asked has ended meanwhile; the next one, as in a test's next case, gets answers of its own."""
    monkeypatch.setattr("orchestrator.control.observe.GPU_TIMEOUT_S", 0.02)
    scene, gate = Scene(), threading.Event()
    scene.gpus.gate = gate

    def another() -> None:
        with asyncio.Runner() as runner:
            runner.run(scene.observer.look())

    await asyncio.to_thread(another)
    scene.gpus.gate = None
    gate.set()
    fresh = scene.observer._gpus.ask()
    assert [card.uuid for card in await fresh] == ["GPU-0"]


HANGS = """
import asyncio, threading
from orchestrator.control.observe import Observer
class Gpus:
    def read(self): threading.Event().wait()
class Engines:
    def look(self): return {}
    segments = look
async def main():
    asking = asyncio.ensure_future(Observer(Gpus(), Engines(), dict, lambda: 0.0).look())
    await asyncio.sleep(0)
    print("asked", flush=True)
asyncio.run(main())
"""


async def test_a_driver_that_hangs_does_not_hold_up_the_end_of_the_daemon() -> None:
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", HANGS, cwd=ROOT, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(30):
            assert await daemon.communicate() == (b"asked\n", b"")
    finally:
        if daemon.returncode is None:
            daemon.kill()
            await daemon.wait()
