"""Engines as real processes (simulated vLLM on simulated GPUs): from the spawn to ready, and the limits of those that are."""

import asyncio
import errno
import stat
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.drivers import kvcached, launcher, processes
from orchestrator.drivers.vllm import PHASES, EngineVenv
from orchestrator.policy.units import GIB, MIB
from tests.support.eventually import eventually
from tests.support.simulated import BUNDLE, CEILING, Workshop

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]


# ---- coming up ------------------------------------------------------------------------------------------------------


async def test_from_start_to_ready_and_to_nothing_left(shop: Workshop) -> None:
    base = shop.used_bytes()
    launch = shop.start(aliases=["also"])
    seen = shop.seen(launch)
    assert (seen.alive, seen.ready, seen.phase, seen.segment) == (True, False, "spawning", None)

    phases = [seen.phase]
    while not shop.seen(launch).ready:
        await eventually(lambda: shop.seen(launch).phase != phases[-1], f"a phase after {phases}")
        phases.append(shop.seen(launch).phase)
    assert phases == sorted(set(phases), key=PHASES.index)
    assert phases[-1] == "ready"

    seen = shop.seen(launch)
    assert seen.error is None
    assert (seen.capacity_bytes, seen.bundle_bytes) == (CEILING, BUNDLE)
    assert seen.segment is not None
    assert (seen.segment.limit_bytes, seen.segment.used_bytes) == (CEILING, BUNDLE)
    assert seen.pid in seen.pids
    assert len(seen.pids) == 2  # the API server and EngineCore
    held = shop.gpus.read()[0].processes
    assert set(held) == {shop.core(launch)}
    assert held[shop.core(launch)] < GIB  # what profiling left (2 GiB) was given back
    assert await shop.complete(launch) == "tiny"
    assert shop.notified >= 3

    folder = shop.root / "run/engines" / launch.id
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its development routes are for the daemon's user alone
    assert shop.launcher.socket(launch.id) == str(folder / "api.sock")
    assert shop.records.kept[launch.id]["process"][0] == seen.pid
    assert shop.launcher.log_file("tiny") == shop.log(launch)
    assert "Application startup complete" in shop.log(launch).read_text()

    await shop.stopped(launch)
    assert shop.leftovers(launch) == []
    assert shop.used_bytes() == base
    assert not psutil.pid_exists(shop.pid(launch))  # not even a zombie
    assert shop.log(launch).exists()  # people will want it
    shop.launcher.forget(launch.id)
    assert shop.launcher.look() == {}


async def test_the_intent_is_written_before_the_spawn(shop: Workshop) -> None:
    shop.records.broken = True
    launch = shop.start()
    assert "disk I/O error" in await shop.failed(launch)
    assert shop.processes() == []
    await shop.stopped(launch)


async def test_a_full_disk_hinders_a_start_and_an_engine_that_runs_goes_on(shop: Workshop) -> None:
    launch = shop.start()
    await eventually(lambda: shop.records.kept.get(launch.id), "the intent is written")
    shop.records.broken = True  # from its pid on
    await shop.ready(launch)
    assert await shop.complete(launch) == "tiny"
    other = shop.start("other")
    assert "disk I/O error" in await shop.failed(other)
    assert shop.seen(other).hindered
    assert not shop.seen(launch).hindered
    shop.records.broken = False
    await shop.restart()
    assert [found.id for found in await shop.launcher.adopt()] == [launch.id]  # found by the log that it writes
    await shop.ready(launch)


async def test_a_log_that_cannot_be_made_hinders_a_start(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(processes, "spawn", spawn)
    launch = shop.start()
    assert "No space left on device" in await shop.failed(launch)
    assert shop.seen(launch).hindered


async def test_a_python_that_cannot_run_is_the_engines_own_fault(shop: Workshop) -> None:
    shop.venvs["default"] = replace(shop.venvs["default"], kind="vllm", python=Path("/bin/nowhere"))
    launch = shop.start()
    await shop.failed(launch)
    assert not shop.seen(launch).hindered


async def test_an_engine_that_dies_at_start_shows_its_last_words(shop: Workshop) -> None:
    launch = shop.start(fault="die_at_start")
    assert "its process exited with code 1 while" in await shop.failed(launch)
    seen = shop.seen(launch)
    assert not seen.alive
    assert any("simulated failure at start" in line for line in seen.log_tail)
    assert any("Engine core initialization failed" in line for line in seen.log_tail)
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_an_argument_that_vllm_does_not_know(shop: Workshop) -> None:
    launch = shop.start(args=["--max-modle-len", "8k"])
    assert "exited with code 2" in await shop.failed(launch)
    assert "unrecognized arguments: --max-modle-len" in shop.seen(launch).log_tail[-1]


async def test_no_memory_at_start(shop: Workshop) -> None:
    launch = shop.start(fault="oom_at_start")
    await shop.failed(launch)
    assert any("CUDA out of memory" in line for line in shop.seen(launch).log_tail)


async def test_never_healthy_stays_a_start_and_can_be_stopped(shop: Workshop) -> None:
    launch = shop.start(fault="hang_at_start")
    await eventually(lambda: shop.seen(launch).phase == "profiling memory", "as far as it comes")
    seen = shop.seen(launch)
    assert (seen.alive, seen.ready, seen.error) == (True, False, None)
    await eventually(lambda: len(shop.seen(launch).pids) == 2, "its memory is known to be ours")
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_plain_vllm_is_refused(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SEGMENT_TIMEOUT_S", 0.2)
    launch = shop.start(fault="no_kvcached")
    assert "kvcached is not active" in await shop.failed(launch)
    assert shop.seen(launch).alive  # it runs, and is not wanted like this
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_a_card_too_full_for_the_first_page_is_told(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SEGMENT_TIMEOUT_S", 0.2)
    shop.take_foreign(shop.gpus.read()[0].free_bytes - 2700 * MIB)  # room for what it loads, and for no page
    launch = shop.start()
    assert "no memory for its first page: the GPU is full" in await shop.failed(launch)


async def test_another_model_at_the_socket_is_refused(shop: Workshop) -> None:
    program = shop.root / "python"
    program.write_text(
        f'#!/bin/sh\nshift\nPYTHONPATH={ROOT} exec {sys.executable} -m orchestrator.engine.simulator "$@" --served-model-name other\n'
    )
    program.chmod(0o755)
    shop.venvs["default"] = replace(shop.venvs["default"], kind="vllm", python=program)
    launch = shop.start()
    assert "serves ['other'], not 'tiny'" in await shop.failed(launch)


async def test_a_venv_that_is_not_there_and_one_that_is_not_configured(shop: Workshop) -> None:
    shop.venvs["real"] = EngineVenv(kind="vllm", python=shop.root / "no/bin/python")
    missing, unknown = shop.start("m", engine="real"), shop.start("u", engine="gone")
    assert "`make engine`" in await shop.failed(missing)
    assert "there is no engine 'gone' any more; known: default, real" in await shop.failed(unknown)
    for launch in (missing, unknown):
        await shop.stopped(launch)
        assert shop.leftovers(launch) == []


async def test_stop_in_the_first_instant(shop: Workshop) -> None:
    launch = shop.start()
    await shop.stopped(launch)
    shop.launcher.stop(launch.id)  # asking again is harmless
    shop.launcher.stop("nobody")
    assert shop.leftovers(launch) == []
    assert shop.processes() == []


# ---- limits ---------------------------------------------------------------------------------------------------------


async def test_a_limit_is_applied_while_the_engine_is_idle(shop: Workshop) -> None:
    launch = await shop.started()
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == CEILING, "what it started with is verified")
    shop.launcher.set_limit(launch.id, BUNDLE)
    assert (segment := shop.seen(launch).segment) is not None
    assert segment.limit_bytes == BUNDLE
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == BUNDLE, "the engine took its limit")
    assert (segment := shop.seen(launch).segment) is not None
    assert (segment.used_bytes, segment.prealloc_bytes) == (BUNDLE, 0)  # its reserve is unmapped without any request
    assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == BUNDLE


async def test_of_many_limits_the_last_one_holds(shop: Workshop) -> None:
    launch = await shop.started()
    for count in range(2, 40):
        shop.launcher.set_limit(launch.id, count * BUNDLE)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 39 * BUNDLE, "the last")
    assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == 39 * BUNDLE


async def test_a_limit_written_while_it_starts_is_applied_when_it_is_ready(shop: Workshop) -> None:
    launch = shop.start()
    await eventually(lambda: shop.seen(launch).segment, "the segment")
    shop.launcher.set_limit(launch.id, 20 * BUNDLE)
    await shop.ready(launch)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 20 * BUNDLE, "applied")
    assert (await shop.api(launch).rpc("kv_status"))["limit_bytes"] == 20 * BUNDLE


async def test_the_wedge_is_cured(shop: Workshop) -> None:
    """A request larger than the limit waits for ever with kvcached alone, also when the limit is raised in the segment."""
    launch = await shop.started()
    shop.launcher.set_limit(launch.id, 2 * BUNDLE)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 2 * BUNDLE, "two bundles")
    request = asyncio.ensure_future(shop.complete(launch, prompt="x" * 3000))
    await shop.until_waiting(launch)
    assert not request.done()
    shop.launcher.set_limit(launch.id, 10 * BUNDLE)
    assert await asyncio.wait_for(request, 20) == "tiny"


async def test_a_limit_below_use_is_taken_and_drains(shop: Workshop) -> None:
    launch = await shop.started(fault="slow_step:0.02")
    request = asyncio.ensure_future(shop.complete(launch, prompt="x" * 5000, max_tokens=40))
    await eventually(lambda: (s := shop.seen(launch).segment) and s.used_bytes > 3 * BUNDLE, "in use")
    shop.launcher.set_limit(launch.id, 2 * BUNDLE)
    await eventually(lambda: shop.seen(launch).acked_limit_bytes == 2 * BUNDLE, "deferred is an answer")
    await request
    await shop.api(launch)._http.post("/reset_prefix_cache")
    await eventually(lambda: (s := shop.seen(launch).segment) and s.mapped_bytes <= 2 * BUNDLE, "drained")


async def test_limits_where_there_is_no_engine(shop: Workshop) -> None:
    with pytest.raises(OSError, match="is over"):
        shop.launcher.set_limit("nobody", BUNDLE)
    launch = shop.start(fault="hang_at_start")
    with pytest.raises(FileNotFoundError):
        shop.launcher.set_limit(launch.id, BUNDLE)
    await shop.stopped(launch)
    with pytest.raises(OSError, match="is over"):
        shop.launcher.set_limit(launch.id, BUNDLE)
    assert not (kvcached.SHM / launch.ipc_name).exists()
