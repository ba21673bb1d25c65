"""The pulse of real (simulated) engines: whoever hangs is found in a bounded time, and nobody else is ever taken for one that hangs.

`hang_s` is short here, so "long" is a second: every proof that somebody is spared waits for several looks that would have condemned it.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx2
import pytest
import pytest_asyncio

from orchestrator.drivers import pulse
from orchestrator.drivers.engine_run import Run
from orchestrator.policy.instance import Launch
from tests.support.eventually import eventually
from tests.support.simulated import BUNDLE, Workshop

pytestmark = pytest.mark.asyncio

HANG_S, PROBE_S = 1.2, 0.6
SLACK_S = 3.0  # of this machine
CORE, API = "EngineCore hangs, while /health is 200: nothing has moved for", "its API server does not answer: nothing has moved for"


class Felt(pulse.Pulse):
    """Counts, so that a test can wait for looks and not for time."""

    by_launch: ClassVar[dict[str, "Felt"]] = {}
    looks = probes = 0

    def __init__(self, run: Run, answer_s: float) -> None:
        super().__init__(run, answer_s)
        self.by_launch[run.launch.id] = self

    @property
    def condemned(self) -> str | None:
        return self._run.error

    async def beats(self) -> bool:
        self.looks += 1
        return await super().beats()

    async def answers_probe(self) -> bool:
        self.probes += 1
        return await super().answers_probe()


def felt(launch: Launch) -> Felt:
    return Felt.by_launch[launch.id]


@pytest_asyncio.fixture
async def ward(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Engines there are judged soon."""
    monkeypatch.setattr(pulse, "PROBE_S", PROBE_S)
    monkeypatch.setattr(pulse, "Pulse", Felt)
    shop.venvs["default"] = replace(shop.venvs["default"], hang_s=HANG_S)
    return shop


@contextlib.asynccontextmanager
async def asking(shop: Workshop, launch: Launch, prompt: str = "x", max_tokens: int = 4000) -> AsyncIterator["asyncio.Task[str]"]:
    """A request that runs meanwhile."""
    request = asyncio.create_task(shop.complete(launch, prompt, max_tokens))
    try:
        yield request
    finally:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


async def serving(shop: Workshop, fault: str = "", **fields: Any) -> Launch:
    """One that has made tokens for somebody, and that was seen."""
    launch = await shop.started(fault=fault, **fields)
    async with asking(shop, launch):
        await eventually(lambda: launch.id in Felt.by_launch and felt(launch).served, "its tokens are seen")
    return launch


async def running(shop: Workshop, launch: Launch) -> None:
    async with asyncio.timeout(20):
        while (await shop.api(launch).rpc("kv_status"))["requests_running"] == 0:
            pass


async def give(shop: Workshop, launch: Launch, fault: str) -> None:
    (await shop.api(launch)._http.post("/sim/fault", json={"set": fault})).raise_for_status()


async def looks(launch: Launch, count: int) -> None:
    """So many more looks at it, of which a few without a sign of life would condemn it."""
    until = felt(launch).looks + count
    await eventually(lambda: felt(launch).looks >= until or felt(launch).condemned, f"{count} looks")
    assert felt(launch).condemned is None


# ---- found ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hang_after:1", "stall_after:1"])
async def test_a_core_that_makes_no_tokens_is_found_although_its_health_is_200(ward: Workshop, fault: str) -> None:
    launch = await serving(ward)
    await give(ward, launch, fault)
    began = time.monotonic()
    async with asking(ward, launch, max_tokens=20):
        assert (await ward.failed(launch)).startswith(CORE)
        assert await ward.api(launch).healthy()
    assert time.monotonic() - began < 2 * HANG_S + PROBE_S + SLACK_S
    assert ward.seen(launch).alive  # nothing else would have shown it


@pytest.mark.parametrize(("part", "said"), [("core", CORE), ("API server", API)])
async def test_a_process_that_stands_still_is_found(ward: Workshop, part: str, said: str) -> None:
    launch = await serving(ward)
    async with asking(ward, launch):
        await running(ward, launch)
        os.kill(ward.core(launch) if part == "core" else ward.pid(launch), signal.SIGSTOP)
        assert (await ward.failed(launch)).startswith(said)


async def test_an_idle_engine_that_stands_still_is_found_before_anybody_asks(ward: Workshop) -> None:
    launch = await serving(ward)
    os.kill(ward.pid(launch), signal.SIGSTOP)
    assert (await ward.failed(launch)).startswith(API)


async def test_one_that_hangs_is_killed_without_grace_and_nothing_is_left(ward: Workshop) -> None:
    ward.venvs["default"] = replace(ward.venvs["default"], stop_grace_s=600.0)
    launch = await serving(ward)
    await give(ward, launch, "hang_after:0,ignore_sigterm")
    async with asking(ward, launch) as request:
        await ward.failed(launch)
        await ward.stopped(launch)
        with pytest.raises(httpx2.HTTPError):  # its requests end with it
            await request
    assert ward.leftovers(launch) == []


async def test_one_that_was_adopted_is_watched_too(ward: Workshop) -> None:
    launch = await serving(ward)
    await ward.restart()
    await ward.launcher.adopt()
    await ward.ready(launch)
    async with asking(ward, launch):
        await eventually(lambda: launch.id in Felt.by_launch and felt(launch).served, "its tokens are seen")
    os.kill(ward.core(launch), signal.SIGSTOP)
    assert (await ward.failed(launch)).startswith(CORE)


async def test_a_first_request_may_take_longer_and_not_for_ever(ward: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "FIRST", 3)
    launch = await ward.started(fault="hang_after:2")  # the first was the probe that made it ready
    began = time.monotonic()
    async with asking(ward, launch):
        assert (await ward.failed(launch)).startswith(CORE)
    assert time.monotonic() - began > 3 * HANG_S


# ---- spared ---------------------------------------------------------------------------------------------------------


async def test_one_that_served_since_the_last_look_is_known_to_have_served(ward: Workshop) -> None:
    """Seen on a GPU: an engine that hung soon after its start was given the patience of one that has never made a token."""
    launch = await ward.started()
    await eventually(lambda: launch.id in Felt.by_launch and felt(launch).looks > 0, "it is watched")
    assert not felt(launch).served
    looked = felt(launch).looks
    await ward.complete(launch, "x", 40)  # idle engines are looked at every HANG_S: this comes in between
    await give(ward, launch, "hang_after:1")
    async with asking(ward, launch, max_tokens=20):
        assert (await ward.failed(launch)).startswith(CORE)
    assert felt(launch).served
    assert felt(launch).looks - looked < 4 * pulse.FIRST


async def test_an_idle_engine_is_only_looked_at(ward: Workshop) -> None:
    launch = await serving(ward)
    await looks(launch, 4)
    assert felt(launch).idle
    assert felt(launch).probes == 0
    assert ward.seen(launch).error is None


async def test_a_prompt_that_takes_minutes_is_no_hang(ward: Workshop) -> None:
    """It makes no token, and a probe waits behind it; but it takes its KV pages one by one."""
    launch = await serving(ward)
    await give(ward, launch, "prefill_chunk:1024,slow_step:0.5")  # a bundle a step
    before = await ward.api(launch).tokens()
    began = time.monotonic()
    async with asking(ward, launch, prompt="y" * 8000, max_tokens=1) as request:
        await running(ward, launch)
        assert await ward.api(launch).tokens() == before
        assert await request == "tiny"
    assert time.monotonic() - began > HANG_S + PROBE_S + HANG_S / pulse.LOOKS
    assert ward.seen(launch).error is None


async def test_one_that_is_starved_of_memory_is_not_killed_for_it(ward: Workshop) -> None:
    """The wedge: what would run it is a limit."""
    launch = await serving(ward)
    ward.launcher.set_limit(launch.id, 2 * BUNDLE)
    await eventually(lambda: ward.seen(launch).acked_limit_bytes == 2 * BUNDLE, "the limit holds")
    async with asking(ward, launch, prompt="x" * 6000, max_tokens=1) as request:
        await ward.until_waiting(launch)
        await looks(launch, 4 * pulse.LOOKS)
        assert not request.done()
        assert ward.seen(launch).error is None
        ward.launcher.set_limit(launch.id, 20 * BUNDLE)
        assert await asyncio.wait_for(request, 20) == "tiny"


async def test_a_sleeping_engine_and_one_that_wakes(ward: Workshop) -> None:
    launch = await serving(ward)
    ward.launcher.sleep(launch.id, 1)
    await eventually(lambda: ward.seen(launch).asleep, "it sleeps")
    os.kill(ward.core(launch), signal.SIGSTOP)  # whatever that would say
    before = felt(launch).looks
    rested = asyncio.Event()
    resting = felt(launch).resting
    count = iter(range(3))

    def rests() -> bool:
        if next(count, None) is None:
            rested.set()
        return resting()

    felt(launch).resting = rests  # type: ignore[method-assign]
    await asyncio.wait_for(rested.wait(), 20)
    assert felt(launch).looks == before
    os.kill(ward.core(launch), signal.SIGCONT)
    ward.launcher.wake(launch.id)
    await eventually(lambda: not ward.seen(launch).asleep, "it is awake")
    await looks(launch, 2)
    assert await ward.complete(launch) == "tiny"
    assert ward.seen(launch).error is None


async def test_a_step_that_takes_long_is_forgiven_when_it_ends(ward: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "PROBE_S", 20.0)  # the step ends within the probe, however late this test is told of it
    launch = await serving(ward)
    async with asking(ward, launch):
        await running(ward, launch)
        os.kill(ward.core(launch), signal.SIGSTOP)
        await eventually(lambda: felt(launch).probes, "it is suspected")
        os.kill(ward.core(launch), signal.SIGCONT)
        await looks(launch, 3 * pulse.LOOKS)
    assert ward.seen(launch).error is None


async def test_slow_tokens_are_tokens(ward: Workshop) -> None:
    launch = await serving(ward, args=["--max-num-seqs", "1"])  # so that a probe would wait
    await give(ward, launch, f"slow_step:{HANG_S / 2}")
    async with asking(ward, launch, max_tokens=100):
        await running(ward, launch)
        await looks(launch, 4 * pulse.LOOKS)
    assert felt(launch).probes == 0
    assert ward.seen(launch).error is None


async def test_where_tokens_are_not_counted_a_core_that_answers_is_enough(ward: Workshop) -> None:
    launch = await serving(ward, args=["--disable-log-stats", "--max-num-seqs", "1"])
    assert await ward.api(launch).tokens() is None
    async with asking(ward, launch):
        await running(ward, launch)
        await looks(launch, 4 * pulse.LOOKS)
        assert ward.seen(launch).error is None
        os.kill(ward.core(launch), signal.SIGSTOP)
        assert (await ward.failed(launch)).startswith(CORE)


async def test_a_daemon_that_stood_still_itself_judges_nobody(ward: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    stood_s = [0.0]
    monotonic = time.monotonic
    launch = await serving(ward)
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: monotonic() + stood_s[0]))
    async with asking(ward, launch):
        await running(ward, launch)
        await looks(launch, 1)
        os.kill(ward.core(launch), signal.SIGSTOP)
        stood_s[0] = 1000.0
        await looks(launch, 1)
        os.kill(ward.core(launch), signal.SIGCONT)
        await looks(launch, 3)
    assert felt(launch).probes == 0
    assert ward.seen(launch).error is None


async def test_nobody_is_watched_where_that_is_turned_off(ward: Workshop) -> None:
    ward.venvs["default"] = replace(ward.venvs["default"], hang_s=None)
    launch = await ward.started()
    assert launch.id not in Felt.by_launch
