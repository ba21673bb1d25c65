"""The end of an engine: whoever died first and whatever ignores a signal, nothing of it is left but its log."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.drivers import kvcached, launcher
from tests.support.eventually import eventually
from tests.support.simulated import Workshop, workshop

pytestmark = pytest.mark.asyncio


PTRACE_CONT, PTRACE_SEIZE, PTRACE_O_TRACEEXIT = 7, 0x4206, 0x40  # linux/ptrace.h


@contextlib.contextmanager
def undying(pid: int) -> Iterator[None]:
    """SIGKILL stops it at the door of its end, as often as it comes, until the block is over."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(PTRACE_SEIZE, pid, None, PTRACE_O_TRACEEXIT) != 0:
        pytest.skip(f"no ptrace here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.ptrace(PTRACE_CONT, pid, None, None)


def shared_memory(pid: int) -> list[Path]:
    """What a process has mapped of /dev/shm, besides kvcached's."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [Path(line.split()[-1]) for line in lines if "/dev/shm/" in line and "/orch-" not in line]


def quick_to_kill(shop: Workshop) -> None:
    shop.venvs["default"] = replace(shop.venvs["default"], stop_grace_s=0.2)


@pytest.mark.parametrize("fault", ["ignore_sigterm", "orphan_core"])
async def test_who_does_not_end_is_killed_with_all_it_left(shop: Workshop, fault: str) -> None:
    quick_to_kill(shop)
    base = shop.used_bytes()
    launch = await shop.started(fault=fault)
    pids = shop.seen(launch).pids
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []
    assert shop.used_bytes() == base
    assert shop.seen(launch).pids >= pids  # a driver may show them a while longer


async def test_a_killed_api_server_is_seen_at_once_and_its_core_is_ended(shop: Workshop) -> None:
    launch = await shop.started()
    core = shop.core(launch)
    before = shop.notified
    os.kill(shop.pid(launch), signal.SIGKILL)
    assert await shop.failed(launch) == "its process was killed by SIGKILL"
    assert shop.notified > before
    assert not shop.seen(launch).alive
    assert core in shop.gpus.read()[0].processes  # nobody's child, and all the memory
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []
    assert shop.gpus.read()[0].processes == {}


async def test_a_killed_core_is_a_failure_although_the_exit_code_is_0(shop: Workshop) -> None:
    launch = await shop.started()
    os.kill(shop.core(launch), signal.SIGKILL)
    assert await shop.failed(launch) == "its process exited with code 0"
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []


async def test_the_tail_is_the_end_of_the_log_however_long_it_ran(shop: Workshop) -> None:
    launch = await shop.started()
    with shop.log(launch).open("ab") as log:
        log.write(b"INFO a request\n" * 200_000)
        log.write(b"CUDA error: an illegal memory access was encountered")  # and no end of line
    os.kill(shop.pid(launch), signal.SIGKILL)
    await shop.failed(launch)
    assert shop.seen(launch).log_tail[-1].endswith("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("part", ["leader", "core", "both"])
async def test_processes_that_stand_still_are_killed_all_the_same(shop: Workshop, part: str) -> None:
    """SIGTERM means nothing to one that is stopped, SIGKILL does."""
    quick_to_kill(shop)
    launch = await shop.started()
    for pid in {"leader": [shop.pid(launch)], "core": [shop.core(launch)], "both": sorted(shop.seen(launch).pids)}[part]:
        os.kill(pid, signal.SIGSTOP)
    await shop.stopped(launch)
    assert shop.leftovers(launch) == []
    assert shop.gpus.read()[0].processes == {}


async def test_one_that_sigkill_does_not_end_is_waited_for_and_named(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the kernel's state D. Here a tracer holds it on its way out."""
    monkeypatch.setattr(launcher, "LONG_S", 0.2)
    quick_to_kill(shop)
    launch = await shop.started()
    core = shop.core(launch)
    with undying(core):
        shop.launcher.stop(launch.id)
        await eventually(lambda: shop.seen(launch).undying, "somebody says so")
        assert shop.seen(launch).undying.startswith(f"pid {core} (state t")
        assert f"SIGKILL does not end pid {core}" in caplog.text
        assert not shop.seen(launch).gone
        assert core in shop.gpus.read()[0].processes  # its memory is not back, and its segment stays
        assert shop.leftovers(launch)
        other = await shop.started("other")  # nobody else waits for it
        await shop.stopped(other)
    await eventually(lambda: shop.seen(launch).gone, "it has ended after all")
    assert shop.seen(launch).undying == ""
    assert shop.leftovers(launch) == []


@pytest.mark.parametrize("how", ["stop", "kill", "kill the leader", "kill the core"])
async def test_an_engine_on_two_gpus_leaves_nothing_anywhere(how: str) -> None:
    async with workshop(2) as shop:
        quick_to_kill(shop)
        if how == "kill":
            shop.venvs["default"] = replace(shop.venvs["default"], env={**shop.venvs["default"].env, "SIM_FAULT": "ignore_sigterm"})
        launch = await shop.started(on=("GPU-sim-0", "GPU-sim-1"), tensor_parallel_size=2)
        core = next(pid for pid in shop.gpus.read()[1].processes)
        made = shared_memory(core)
        assert {path.name.partition("_")[0] for path in made} == {"psm"}  # its queue to the workers
        assert len(shop.seen(launch).pids) == 3  # API server, EngineCore, and the tracker of that queue
        if how in ("kill the leader", "kill the core"):
            os.kill(shop.pid(launch) if how == "kill the leader" else core, signal.SIGKILL)
            await shop.failed(launch)
        await shop.stopped(launch)
        assert shop.leftovers(launch) == []
        assert [gpu.processes for gpu in shop.gpus.read()] == [{}, {}]
        assert [path for path in made if path.exists()] == []
        assert list(kvcached.SHM.glob(f"*{launch.id}*")) == []


async def test_what_another_daemons_engine_has_is_not_touched(shop: Workshop) -> None:
    """Its segment, its workers' folder, its sockets: named as ours are, under another launch id."""
    launch = await shop.started()
    others = [kvcached.SHM / f"orch-test-{os.getpid():08x}", Path(f"/tmp/kvcached-tp-orch-test-{os.getpid():08x}-0123abcd")]
    others[0].write_bytes(bytes(24))
    others[1].mkdir()
    try:
        async with workshop() as neighbour:
            theirs = await neighbour.started("tiny")  # a model of the same name, too
            await shop.stopped(launch)
            await shop.restart()
            assert await shop.launcher.adopt() == []
            assert neighbour.seen(theirs).alive
            assert await neighbour.complete(theirs) == "tiny"
            assert all(path.exists() for path in others)
            assert (neighbour.root / "run/engines" / theirs.id / "api.sock").exists()
    finally:
        others[0].unlink()
        others[1].rmdir()


async def test_a_store_that_fails_does_not_keep_an_engine_stopping_for_ever(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    launch = await shop.started()
    shop.records.broken = True
    await shop.stopped(launch)
    assert shop.leftovers(launch) == ["record"]
    assert "was not removed" in caplog.text
    shop.records.broken = False
    await shop.restart()
    assert await shop.launcher.adopt() == []
    await eventually(lambda: shop.leftovers(launch) == [], "the next daemon removed the record")


# ---- logs -----------------------------------------------------------------------------------------------------------


async def test_models_with_like_names_have_logs_of_their_own(shop: Workshop) -> None:
    names = ("qwen2.5-7b-instruct-one", "qwen2.5-7b-instruct-two", "Qwen2-5-7B-Instruct-One")
    launches = {name: shop.start(name, fault="die_at_start") for name in names}
    for launch in launches.values():
        await shop.failed(launch)
    assert {name: shop.launcher.log_file(name) for name in names} == {name: shop.log(launch) for name, launch in launches.items()}
    assert shop.launcher.log_file("nobody") is None


async def test_old_logs_go_and_those_of_others_stay(shop: Workshop) -> None:
    other = shop.start("other", fault="die_at_start")
    await shop.failed(other)
    for _ in range(2):
        launch = shop.start(fault="die_at_start")
        await shop.failed(launch)
    stem = shop.log(launch).name.partition(".")[0]
    for age in range(10):
        old = shop.root / "logs" / f"{stem}.{age:08x}.log"
        old.touch()
        os.utime(old, (age, age))
    await shop.failed(shop.start(fault="die_at_start"))
    kept = sorted(path.name for path in (shop.root / "logs").glob(f"{stem}.*.log"))
    assert len(kept) == launcher.KEPT_LOGS + 1
    assert f"{stem}.00000000.log" not in kept
    assert shop.log(launch).name in kept
    assert shop.log(other).exists()


LINGERS = """#!{python}
import ctypes, os, signal, sys, threading, time
signal.signal(signal.SIGTERM, lambda *_: None)
def linger():
    gone.wait()
    time.sleep(0.5)
    os._exit(0)
gone = threading.Event()
threading.Thread(target=linger).start()
print("lingers", flush=True)
signal.pause()
gone.set()
ctypes.CDLL(None).pthread_exit(None)
"""


async def test_a_leader_whose_threads_outlive_its_main_thread_is_waited_for(shop: Workshop) -> None:
    """It looks like a zombie meanwhile, and can not be reaped: vLLM's API server ends so."""
    program = shop.root / "python"
    program.write_text(LINGERS.format(python=sys.executable))
    program.chmod(0o755)
    shop.venvs["default"] = replace(shop.venvs["default"], kind="vllm", python=program)
    launch = shop.start()
    await eventually(lambda: shop.log(launch).exists() and "lingers" in shop.log(launch).read_text(), "it runs")
    pid = shop.pid(launch)
    await shop.stopped(launch)
    assert not psutil.pid_exists(pid)
