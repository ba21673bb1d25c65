"""What is done to an engine that lives: its limit applied, memory given back, its segment made anew, sleep and wake.

A limit in the segment alone is not enough: an engine reads it only inside an allocation, an idle or starved one never. So whoever
writes one sees to it here that the engine is told. Only a sleep or a wake that fails is fatal to an engine.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.drivers import kvcached
from orchestrator.drivers.engine_run import Run
from orchestrator.policy.snapshot import Segment

log = logging.getLogger(__name__)

RETRY_S = 1.0
SETTLE_S = 0.02  # kvcached's watcher sees the segment every 0.1 s; a limit is not applied before


def set_limit(run: Run, limit_bytes: int, kvctl: Path | None) -> None:
    """Write it, unless `kvctl` is to, and have it applied. Raises OSError where the segment is not there."""
    if kvctl is None:
        kvcached.write_limit(run.launch.ipc_name, limit_bytes)
    if run.acked_limit == limit_bytes:  # it held once; another one came between, ours or a stranger's, so it must be told anew
        run.acked_limit = 0
    run.wanted_limit = limit_bytes
    apply_limit(run, kvctl)


def apply_limit(run: Run, kvctl: Path | None) -> None:
    if run.ready and run.acked_limit != run.wanted_limit and not run.busy("apply limit"):
        run.begin("apply limit", lambda run: _until_applied(run, kvctl))


async def _until_applied(run: Run, kvctl: Path | None) -> None:
    assert run.api is not None
    while run.alive and run.wanted_limit is not None and run.acked_limit != run.wanted_limit:
        wanted = run.wanted_limit
        try:
            if kvctl is not None and (segment := kvcached.read(run.launch.ipc_name)) and segment.limit_bytes != wanted:
                await _have_written(run, wanted, kvctl)
            answer = await run.api.rpc("kv_limit", wanted, time.monotonic_ns())  # counts from boot: never back
        except (httpx2.HTTPError, OSError, KeyError, ValueError) as error:
            log.warning("%s: the engine did not take its limit: %s", run.model, error)
            await asyncio.sleep(RETRY_S)
            continue
        if answer.get("settled") is False:
            await asyncio.sleep(SETTLE_S)
        elif answer.get("status") in ("applied", "deferred"):  # deferred: use is above it, it drains as requests finish
            run.acked_limit = wanted
        else:
            log.warning("%s: limit %d: the engine answered %s %s", run.model, wanted, answer.get("status"), answer.get("reason"))
            await asyncio.sleep(RETRY_S)
    run.notify()


async def _have_written(run: Run, limit_bytes: int, kvctl: Path) -> None:
    """`kvctl limit`, then read back: it exits 0 whatever happens."""
    told = await asyncio.create_subprocess_exec(
        str(kvctl), "limit", run.launch.ipc_name, str(limit_bytes),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = await told.communicate()
    except asyncio.CancelledError:  # its engine is being ended, and it would make the segment that is then removed anew
        told.kill()
        await told.wait()
        raise
    segment = kvcached.read(run.launch.ipc_name)
    if segment is None or segment.limit_bytes != limit_bytes:
        raise ValueError(f"kvctl did not set it: {said.decode(errors='replace').strip()[-300:]}")


def sleep(run: Run, level: int) -> None:
    """It is asleep when it says so itself; anything but that is the end of it: its weights may be half gone."""
    if run.ready and run.alive and not run.asleep and not run.busy("sleep"):
        run.begin("sleep", lambda run: _asleep(run, level))


async def _asleep(run: Run, level: int) -> None:
    assert run.api is not None
    await run.cancel("trim")
    began = time.monotonic()
    try:
        await run.api.sleep(level)
        if not await run.api.sleeping():
            return run.fail("it was told to sleep, and says that it does not")
        run.sleep_s = time.monotonic() - began
        run.host_bytes = int((await run.api.rpc("kv_host_memory"))["host_bytes"])
        await run.api.rpc("kv_trim")
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        return run.fail(f"it did not go to sleep: {said(error)}")
    run.asleep = True
    run.notify()


def wake(run: Run) -> None:
    """It is awake when it has answered a token."""
    if run.ready and run.alive and run.asleep and not run.busy("wake"):
        run.begin("wake", _awake)


async def _awake(run: Run) -> None:
    assert run.api is not None
    began = time.monotonic()
    try:
        await run.api.wake()
        if await run.api.sleeping():
            return run.fail("it was woken, and says that it sleeps")
        await run.api.probe(run.model)
    except (httpx2.HTTPError, KeyError, ValueError) as error:
        return run.fail(f"it did not wake: {said(error)}")
    run.wake_s = time.monotonic() - began
    run.asleep = False
    run.notify()


def said(error: Exception) -> str:
    """What an engine's answer was, or why there was none."""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"{error.request.url.path} answered {error.response.status_code} {error.response.text.strip()[:300]}"
    return f"{type(error).__name__}: {error}"


def trim(run: Run) -> None:
    _aside(run, "trim", _trim)


async def _trim(run: Run) -> None:
    assert run.api is not None
    await run.api.reset_prefix_cache()
    await run.api.rpc("kv_trim")
    await run.api.rpc("kv_empty_cache")


def repair(run: Run) -> None:
    _aside(run, "repair", _repair)


async def _repair(run: Run) -> None:
    assert run.api is not None
    status = await run.api.rpc("kv_status")
    limit, used, mapped = (run.wanted_limit or int(status["limit_bytes"])), int(status["used_bytes"]), int(status["mapped_bytes"])
    kvcached.restore(run.launch.ipc_name, Segment(limit, used, mapped - used))
    log.warning("%s: its segment was gone, or was none any more: it was made anew", run.model)


def _aside(run: Run, name: str, work: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
    """Run one thing beside the others, if the engine can be asked; a failure is logged, and the next look shows it."""

    async def told(run: Run) -> None:
        try:
            await work(run)
        except (httpx2.HTTPError, OSError, KeyError, ValueError) as error:
            log.warning("%s: %s failed: %s: %s", run.model, name, type(error).__name__, error)
            await asyncio.sleep(RETRY_S)  # an engine that is dying removes its segment first, and was asked fifty times a second
        run.notify()

    if run.ready and run.alive and not run.busy(name):
        run.begin(name, told)
