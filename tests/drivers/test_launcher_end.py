"""The end of an engine: whoever died first and whatever ignores a signal, nothing of it is left but its log."""

import os
import signal
import sys
from dataclasses import replace

import psutil
import pytest

from orchestrator.drivers import launcher
from tests.support.eventually import eventually
from tests.support.simulated import Workshop

pytestmark = pytest.mark.asyncio


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
