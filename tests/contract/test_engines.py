"""What the loop may rely on of engines: the same tests on the fake world's and on a Launcher with real (simulated) processes."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

import pytest
import pytest_asyncio

from orchestrator.control.ports import Engines, Gpus
from orchestrator.drivers import kvcached
from orchestrator.policy.instance import Launch
from orchestrator.policy.snapshot import EngineSeen
from orchestrator.policy.units import GIB
from tests.control import fakes
from tests.control.fakes import Clock, FakeEngines, FakeGpus
from tests.support import simulated
from tests.support.eventually import DEADLINE_S
from tests.support.simulated import Workshop

pytestmark = pytest.mark.asyncio


class Rig(Protocol):
    """`launch` makes one that was not started; `step` lets the world go on a little; `kill` ends an engine's leader by force, `lose`
    removes its segment behind its back."""

    gpus: Gpus
    bundle_bytes: int

    @property
    def engines(self) -> Engines: ...

    def launch(self, bad: bool = False) -> Launch: ...

    async def step(self) -> None: ...

    def kill(self, launch: Launch) -> None: ...

    def lose(self, launch: Launch) -> None: ...

    async def restart(self) -> None: ...

    async def close(self) -> None: ...


class Fake:
    bundle_bytes = fakes.BUNDLE

    def __init__(self) -> None:
        self.gpus = FakeGpus()
        self.engines = FakeEngines(self.gpus, Clock())
        self._bad: set[str] = set()

    def launch(self, bad: bool = False) -> Launch:
        launch_id = secrets.token_hex(4)
        if bad:
            self.engines.fail_next.append(("its process exited with code 1 while importing", ("Traceback", "RuntimeError: no")))
        return Launch(launch_id, f"orch-test-{launch_id}", fakes.spec(f"m{launch_id}"), ("GPU-0",), 4 * GIB, GIB, 50 * self.bundle_bytes)

    async def step(self) -> None:
        self.engines.step()

    def kill(self, launch: Launch) -> None:
        self.engines.crash(launch.spec.name)

    def lose(self, launch: Launch) -> None:
        self.engines.all[launch.id].hidden = True

    async def restart(self) -> None:
        former = list(self.engines.all.values())
        self.gpus.engines = {}
        self.engines = FakeEngines(self.gpus, Clock())
        self.engines.records = former

    async def close(self) -> None:
        pass


class Real:
    bundle_bytes = simulated.BUNDLE
    forked = False

    def __init__(self) -> None:
        self._shop = Workshop()
        self._shop.venvs["default"] = replace(self._shop.venvs["default"], launch_server=self.forked)
        self.gpus = self._shop.gpus

    @property
    def engines(self) -> Engines:
        return self._shop.launcher

    def launch(self, bad: bool = False) -> Launch:
        return self._shop.launch(fault="die_at_start" if bad else "")

    async def step(self) -> None:
        await asyncio.sleep(0.01)

    def kill(self, launch: Launch) -> None:
        os.kill(self._shop.pid(launch), signal.SIGKILL)

    def lose(self, launch: Launch) -> None:
        (kvcached.SHM / launch.ipc_name).unlink()

    async def restart(self) -> None:
        await self._shop.restart()

    async def close(self) -> None:
        await self._shop.close()


class Forked(Real):
    """Engines of a launch server."""

    forked = True


@pytest_asyncio.fixture(params=[Fake, Real, Forked])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    make: Callable[[], Rig] = request.param
    made = make()
    try:
        yield made
    finally:
        await made.close()


async def until(rig: Rig, launch: Launch, holds: Callable[[EngineSeen], object]) -> EngineSeen:
    async with asyncio.timeout(DEADLINE_S):
        while not holds(seen := rig.engines.look()[launch.id]):
            await rig.step()
            await asyncio.sleep(0)
    return seen


async def start(rig: Rig) -> Launch:
    launch = rig.launch()
    rig.engines.start(launch)
    await until(rig, launch, lambda seen: seen.ready)
    return launch


async def test_nothing_is_there_before_anything_was_started(rig: Rig) -> None:
    assert await rig.engines.adopt() == []
    assert rig.engines.look() == {}


async def test_a_start_is_seen_at_once_and_becomes_ready_with_a_pool(rig: Rig) -> None:
    launch = rig.launch()
    rig.engines.start(launch)
    seen = rig.engines.look()[launch.id]
    assert (seen.launch_id, seen.alive, seen.ready, seen.gone, seen.error) == (launch.id, True, False, False, None)
    assert (seen.segment, seen.adopted) == (None, False)

    seen = await until(rig, launch, lambda seen: seen.ready)
    assert (seen.alive, seen.phase, seen.error) == (True, "ready", None)
    assert (seen.capacity_bytes, seen.bundle_bytes) == (launch.ceiling_bytes, rig.bundle_bytes)
    assert seen.segment is not None
    assert seen.segment.limit_bytes == launch.ceiling_bytes
    assert seen.segment.used_bytes == rig.bundle_bytes
    assert seen.pid in seen.pids
    (card,) = rig.gpus.read()
    assert sum(card.processes.get(pid, 0) for pid in seen.pids) > seen.segment.mapped_bytes


async def test_a_limit_is_written_at_once_and_taken_soon(rig: Rig) -> None:
    launch = await start(rig)
    limit = 7 * rig.bundle_bytes
    rig.engines.set_limit(launch.id, limit)
    segment = rig.engines.look()[launch.id].segment
    assert segment is not None
    assert segment.limit_bytes == limit
    seen = await until(rig, launch, lambda seen: seen.acked_limit_bytes == limit)
    assert seen.segment is not None
    assert seen.segment.limit_bytes == limit


async def test_a_limit_without_a_segment_is_an_oserror(rig: Rig) -> None:
    with pytest.raises(OSError, match=r".+"):
        rig.engines.set_limit("nobody", rig.bundle_bytes)
    launch = rig.launch()
    rig.engines.start(launch)
    with pytest.raises(OSError, match=r".+"):
        rig.engines.set_limit(launch.id, rig.bundle_bytes)


async def test_trim_leaves_an_idle_engine_next_to_nothing_and_may_be_asked_again(rig: Rig) -> None:
    launch = await start(rig)
    free = rig.gpus.read()[0].free_bytes
    rig.engines.trim(launch.id)
    rig.engines.trim(launch.id)
    seen = await until(rig, launch, lambda seen: seen.segment and seen.segment.prealloc_bytes == 0)
    assert seen.segment is not None
    assert (seen.segment.used_bytes, seen.error) == (rig.bundle_bytes, None)
    assert rig.gpus.read()[0].free_bytes >= free


async def test_segments_are_those_of_the_engines_that_were_looked_at(rig: Rig) -> None:
    assert rig.engines.segments() == {}
    launch = await start(rig)
    assert rig.engines.segments() == {launch.id: rig.engines.look()[launch.id].segment}
    rig.engines.set_limit(launch.id, 7 * rig.bundle_bytes)
    segment = rig.engines.segments()[launch.id]
    assert segment is not None
    assert segment.limit_bytes == 7 * rig.bundle_bytes
    rig.engines.stop(launch.id)
    await until(rig, launch, lambda seen: seen.gone)
    assert rig.engines.segments() == {launch.id: None}


async def test_a_segment_that_was_lost_is_made_anew_with_the_limit_that_held(rig: Rig) -> None:
    launch = await start(rig)
    limit = 7 * rig.bundle_bytes
    rig.engines.set_limit(launch.id, limit)
    await until(rig, launch, lambda seen: seen.acked_limit_bytes == limit)
    rig.lose(launch)
    seen = rig.engines.look()[launch.id]
    assert (seen.segment, seen.alive, seen.ready, seen.error) == (None, True, True, None)
    with pytest.raises(OSError, match=r".+"):
        rig.engines.set_limit(launch.id, limit)
    rig.engines.repair(launch.id)
    rig.engines.repair(launch.id)
    seen = await until(rig, launch, lambda seen: seen.segment)
    assert seen.segment is not None
    assert seen.segment.limit_bytes == limit
    assert seen.segment.used_bytes >= rig.bundle_bytes
    rig.engines.set_limit(launch.id, 9 * rig.bundle_bytes)
    await until(rig, launch, lambda seen: seen.acked_limit_bytes == 9 * rig.bundle_bytes)


async def test_nothing_is_trimmed_or_made_for_an_engine_that_is_not_there_or_not_ready(rig: Rig) -> None:
    launch = rig.launch()
    for launch_id in ("nobody", launch.id):
        rig.engines.trim(launch_id)
        rig.engines.repair(launch_id)
    rig.engines.start(launch)
    rig.engines.trim(launch.id)
    rig.engines.repair(launch.id)
    assert rig.engines.look()[launch.id].segment is None  # a segment without an engine would be a phantom
    await until(rig, launch, lambda seen: seen.ready)
    rig.kill(launch)
    await until(rig, launch, lambda seen: not seen.alive)
    rig.lose(launch)
    rig.engines.repair(launch.id)
    await rig.step()
    assert rig.engines.look()[launch.id].segment is None


async def test_stop_ends_in_gone_with_its_memory_back_and_may_be_asked_again(rig: Rig) -> None:
    free = rig.gpus.read()[0].free_bytes
    launch = await start(rig)
    assert rig.gpus.read()[0].free_bytes < free
    rig.engines.stop(launch.id)
    rig.engines.stop(launch.id)
    seen = await until(rig, launch, lambda seen: seen.gone)
    assert (seen.alive, seen.segment) == (False, None)
    assert rig.gpus.read()[0].free_bytes == free
    rig.engines.stop(launch.id)
    with pytest.raises(OSError, match=r".+"):
        rig.engines.set_limit(launch.id, rig.bundle_bytes)
    rig.engines.forget(launch.id)
    assert rig.engines.look() == {}


async def test_stop_while_it_starts(rig: Rig) -> None:
    launch = rig.launch()
    rig.engines.start(launch)
    await rig.step()
    rig.engines.stop(launch.id)
    seen = await until(rig, launch, lambda seen: seen.gone)
    assert not seen.ready


async def test_unknown_launches_are_no_trouble(rig: Rig) -> None:
    rig.engines.stop("nobody")
    rig.engines.forget("nobody")
    assert rig.engines.look() == {}


async def test_a_start_that_fails_says_why_and_what_it_logged(rig: Rig) -> None:
    launch = rig.launch(bad=True)
    rig.engines.start(launch)
    seen = await until(rig, launch, lambda seen: seen.error and not seen.alive)
    assert "exited with code 1" in str(seen.error)
    assert any("RuntimeError" in line for line in seen.log_tail)
    assert not seen.gone  # until somebody stops it: what it left is not removed behind the loop's back
    rig.engines.stop(launch.id)
    await until(rig, launch, lambda seen: seen.gone)


async def test_a_crash_is_not_gone_until_it_was_stopped(rig: Rig) -> None:
    launch = await start(rig)
    rig.kill(launch)
    seen = await until(rig, launch, lambda seen: not seen.alive)
    assert "killed by SIGKILL" in str(seen.error)
    assert not seen.gone
    assert seen.segment is not None
    rig.engines.stop(launch.id)
    seen = await until(rig, launch, lambda seen: seen.gone)
    assert seen.segment is None


async def test_adoption_takes_over_what_runs(rig: Rig) -> None:
    launch = await start(rig)
    pid = rig.engines.look()[launch.id].pid
    await rig.restart()
    assert await rig.engines.adopt() == [launch]
    seen = await until(rig, launch, lambda seen: seen.ready)
    assert (seen.adopted, seen.pid, seen.error) == (True, pid, None)
    assert seen.capacity_bytes == launch.ceiling_bytes
    rig.engines.set_limit(launch.id, 9 * rig.bundle_bytes)
    await until(rig, launch, lambda seen: seen.acked_limit_bytes == 9 * rig.bundle_bytes)
    rig.engines.stop(launch.id)
    await until(rig, launch, lambda seen: seen.gone)


async def test_two_engines_are_two(rig: Rig) -> None:
    one, two = await start(rig), await start(rig)
    rig.engines.set_limit(one.id, 5 * rig.bundle_bytes)
    segment = rig.engines.look()[two.id].segment
    assert segment is not None
    assert segment.limit_bytes == two.ceiling_bytes
    rig.engines.stop(one.id)
    await until(rig, one, lambda seen: seen.gone)
    assert rig.engines.look()[two.id].ready
