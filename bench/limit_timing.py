"""Seconds from the word to the deed: an operator moves a ceiling, and the engine itself says (kv_status) that its limit is the new one.

Engines that are idle, and engines with a request that does not fit under their limit (starved): the two that kvcached leaves
alone when only its segment is written. Neither allocates meanwhile, so nothing puts the old limit back. And the lower half by
itself: Launcher.set_limit until the engine has said yes and its watcher has seen the segment.
"""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.box import Box
from bench.folders import of_shape
from bench.workloads import ask, client
from orchestrator.drivers.launcher import Launcher
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.drivers.vllm import EngineApi, EngineVenv
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec

GIB = 1 << 30
TIMEOUT_S = 5.0  # a change that is not in force by then counts as this, and is told
POLL_S = 0.002
QUIET_S = 0.3  # at most, before a change: none begins at the same point of the loop's quarter of a second
SETTLE_S = 3.0  # the allocator lets a pool rest for 2 s after a move that nothing forced
LAUNCHER_CHANGES = 60


@dataclass
class Times:
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"idle": [], "starved": []})
    late: list[str] = field(default_factory=list)


async def in_force(box: Box, idle: Sequence[str], starved: Sequence[str], steps: int, token_bytes: int) -> Times:
    """`steps` changes of each model, in turns. Idle ones go down by a bundle a step, starved ones up (and stay starved).

    `token_bytes`: KV of one token.
    """
    times, dice = Times(), random.Random(7)
    there = box.models()
    bundle = int(there[idle[0]]["pool"]["bundle_bytes"])
    ceiling = {name: 30 * bundle for name in idle} | {name: 2 * bundle for name in starved}
    async with AsyncExitStack() as held:
        engines = {name: EngineApi(Path(there[name]["engine"]["socket"])) for name in ceiling}
        for engine in engines.values():
            held.push_async_callback(engine.close)
        for name, size in ceiling.items():
            await asyncio.to_thread(box.limit, name, kv_ceiling=size)
        for name, size in ceiling.items():
            if await _until(engines[name], size) is None:
                raise RuntimeError(f"{name}: its first ceiling was not in force within {TIMEOUT_S:.0f}s")
        api = await held.enter_async_context(client(box.url))
        tokens = (2 + steps + 2) * bundle // token_bytes
        waiting = [asyncio.create_task(ask(api, name, tokens, 1, False, f"{name} ")) for name in starved]
        try:
            await _until_starved([engines[name] for name in starved])
        except RuntimeError as error:
            answered = [task.result() for task in waiting if task.done()]
            raise RuntimeError(f"{error}; answered: {answered[:2]}") from None
        await asyncio.sleep(SETTLE_S)
        for _ in range(steps):
            for name in (name for pair in zip(idle, starved, strict=True) for name in pair):
                kind = "idle" if name in idle else "starved"
                ceiling[name] += -bundle if kind == "idle" else bundle
                await asyncio.sleep(dice.uniform(0, QUIET_S))
                began = time.monotonic()
                told = asyncio.create_task(asyncio.to_thread(box.limit, name, kv_ceiling=ceiling[name]))
                at = await _until(engines[name], ceiling[name])
                await told
                times.seconds[kind].append(TIMEOUT_S if at is None else at - began)
                if at is None:
                    status = await engines[name].rpc("kv_status")
                    times.late.append(f"{name} ({kind}): {ceiling[name] // bundle} bundles asked for, {status}")
        for task in waiting:
            if task.done():
                times.late.append(f"a starved request was answered: {task.result()}")
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return times


async def launcher(env: Mapping[str, str], shape: Mapping[str, Any]) -> list[float]:
    """One engine of a Launcher of our own: from set_limit to the limit that look() calls acknowledged."""
    with tempfile.TemporaryDirectory(prefix="orch-", dir="/tmp") as name:
        root = Path(name)
        gpu = SimGpus(root / "gpu", 1, 141 * GIB).read()[0]
        venv = EngineVenv(kind="simulated", env={**env, "SIM_GPU_DIR": str(root / "gpu")})
        launcher = Launcher({"default": venv}, root / "run", root / "logs", _NoRecords(), lambda: None)
        spec = ModelSpec(name="alone", source=str(of_shape(root / "model", shape)))
        launch = Launch("0badcafe", "orch-bench-0badcafe", spec, (gpu.uuid,), 4 * GIB, GIB, 40 * GIB)
        launcher.start(launch)
        try:
            await _seen(launcher, launch, "ready", True, 60)
            bundle = launcher.look()[launch.id].bundle_bytes
            seconds = []
            for number in range(LAUNCHER_CHANGES):
                size = (100 + (number * 37) % 200) * bundle
                began = time.monotonic()
                launcher.set_limit(launch.id, size)
                await _seen(launcher, launch, "acked_limit_bytes", size, TIMEOUT_S)
                seconds.append(time.monotonic() - began)
                await asyncio.sleep(random.Random(number).uniform(0, QUIET_S / 3))
            return seconds
        finally:
            launcher.stop(launch.id)
            await _seen(launcher, launch, "gone", True, 30)


async def _seen(launcher: Launcher, launch: Launch, what: str, value: object, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while getattr(seen := launcher.look()[launch.id], what) != value:
        if seen.error or time.monotonic() > deadline:
            raise RuntimeError(f"{what} is {getattr(seen, what)}, not {value}: {seen.error or f'{timeout_s:.0f}s are over'}")
        await asyncio.sleep(POLL_S)


async def _until(engine: EngineApi, limit_bytes: int) -> float | None:
    """When the engine said so (time.monotonic()); None: not in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while (await engine.rpc("kv_status"))["limit_bytes"] != limit_bytes:
        if time.monotonic() > deadline:
            return None
        await asyncio.sleep(POLL_S)
    return time.monotonic()


async def _until_starved(engines: Sequence[EngineApi]) -> None:
    deadline = time.monotonic() + 3 * TIMEOUT_S
    for engine in engines:
        while (await engine.rpc("kv_status"))["requests_waiting"] == 0:
            if time.monotonic() > deadline:
                raise RuntimeError("the requests that should starve do not wait in their engines")
            await asyncio.sleep(0.02)


class _NoRecords:
    """A store that keeps nothing: this launcher has no successor."""

    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None:
        json.dumps(record)

    async def remove_engine(self, launch_id: str) -> None: ...

    async def engines(self) -> Mapping[str, Mapping[str, Any]]:
        return {}
