"""Each fault of the schedule, done: here those of engines, of their segments and of the card. Everything is undone after its time.

Only processes whose output goes to this daemon's own logs are signalled. What is done is written in the book first.
"""

import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.chaos.book import Book
from bench.chaos.commands import Operator
from bench.chaos.daemon import Daemon, session
from bench.chaos.daemon_faults import DaemonFaults, Engine
from bench.chaos.http import Broken, call
from bench.chaos.schedule import Step
from bench.foreign import Foreign, ForeignError

MIB = 2**20
ENGINE_FAULTS = {  # of the simulated engine
    "hang": "hang_after:0", "die-later": "die_after:0", "errors-500": "error_500", "slow": "slow_step:0.05", "deaf": "ignore_sigterm",
    "orphan": "orphan_core", "bad-wake": "wake_oom", "bad-sleep": "sleep_500",
}  # fmt: skip


class Faults:
    """`done`: how often each was; `skipped`: there was nothing to do it to."""

    def __init__(self, daemon: Daemon, book: Book, operator: Operator, models: dict[str, Any], foreign: Sequence[Foreign]) -> None:
        self._daemon, self._book, self._foreign = daemon, book, foreign
        self.of_daemon = DaemonFaults(daemon, book, operator, models, self.engines)
        self._held: set[int] = set()  # processes that are stopped
        self.done: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    async def do(self, step: Step) -> None:
        try:
            acted = await self._how(step.fault)(step)
        except (Broken, TimeoutError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            acted = False
            if step.fault.endswith("-daemon"):
                self.of_daemon.problems.append(f"{step.fault}: {type(error).__name__}: {error}")
        (self.done if acted else self.skipped)[step.fault] += 1

    async def mend(self) -> None:
        """Whatever is still wrong is not any more."""
        for pid in list(self._held):
            self._signal(pid, signal.SIGCONT)
        (self._daemon.state / "fill").unlink(missing_ok=True)
        for foreign in self._foreign:
            with contextlib.suppress(ForeignError):
                await asyncio.to_thread(foreign.give_all)
        if not self._daemon.up:
            await self._daemon.start()
        for engine in await self.engines():
            with contextlib.suppress(Broken, TimeoutError):
                await call(engine.socket, "POST", "/sim/fault", {"set": ""}, 5.0)

    async def engines(self) -> list[Engine]:
        """Those with a process, by model."""
        found = []
        for name, model in sorted((await self._daemon.models()).items()):
            engine = model["engine"]
            if engine and engine["pid"]:
                bundle = (model["pool"] or {}).get("bundle_bytes", 8 * MIB)
                socket = Path(engine["socket"])
                found.append(Engine(name, engine["launch_id"], engine["pid"], engine["ipc_name"], socket, model["state"], bundle))
        return found

    def _how(self, fault: str) -> Callable[[Step], Awaitable[bool]]:
        if fault in ENGINE_FAULTS:
            return self._engine_fault
        return {
            "kill-api": self._kill, "kill-core": self._kill, "kill-engine": self._kill,
            "stop-api": self._stop, "stop-core": self._stop, "stop-engine": self._stop,
            "kill-launch-server": self._launch_server, "stop-launch-server": self._launch_server,
            "kill-daemon": self.of_daemon.kill, "stop-daemon": self.of_daemon.stop, "end-daemon": self.of_daemon.end,
            "restart-daemon": self.of_daemon.restart,
            "zero-segment": self._segment, "delete-segment": self._segment, "cut-segment": self._segment, "starve": self._segment,
            "grab": self._grab, "fill-disk": self.of_daemon.fill,
            "reload": self.of_daemon.reload, "bad-reload": self.of_daemon.bad_reload,
        }[fault]  # fmt: skip

    # ---- engines --------------------------------------------------------------------------------------------------

    async def _one(self, step: Step) -> Engine | None:
        engines = await self.engines() if self._daemon.up else []
        return engines[int(step.which * len(engines))] if engines else None

    def _members(self, step: Step, engine: Engine) -> list[int]:
        """Whom that fault is about."""
        theirs = [pid for pid in self._daemon.engine_processes() if session(pid) == engine.pid]
        if step.fault.endswith("-api"):
            return [pid for pid in theirs if pid == engine.pid]
        return [pid for pid in theirs if pid != engine.pid] if step.fault.endswith("-core") else theirs

    async def _kill(self, step: Step) -> bool:
        engine = await self._one(step)
        members = self._members(step, engine) if engine else []
        if engine and members:
            self._book.hurt(engine.model, step.fault)
        return any([self._signal(pid, signal.SIGKILL) for pid in members])

    async def _stop(self, step: Step) -> bool:
        engine = await self._one(step)
        members = self._members(step, engine) if engine else []
        if not engine or not members:
            return False
        return await self._hold(members, engine.model, step)

    async def _hold(self, pids: list[int], model: str | None, step: Step) -> bool:
        harm = self._book.harm(model, step.fault)
        held = [pid for pid in pids if self._signal(pid, signal.SIGSTOP)]
        self._held.update(held)
        try:
            await asyncio.sleep(step.for_s)
        finally:
            for pid in held:
                self._signal(pid, signal.SIGCONT)
            self._held.difference_update(held)
            harm.ended = time.monotonic()
        return bool(held)

    def _signal(self, pid: int, number: signal.Signals) -> bool:
        """Only one of ours: a number may be somebody else's by now."""
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/1").startswith(f"{self._daemon.logs}/"):
                os.kill(pid, number)
                return True
        return False

    async def _engine_fault(self, step: Step) -> bool:
        engine = await self._one(step)
        if engine is None:
            return False
        harm = self._book.harm(engine.model, step.fault)
        try:
            status, _ = await call(engine.socket, "POST", "/sim/fault", {"set": ENGINE_FAULTS[step.fault]}, 5.0)
            await asyncio.sleep(step.for_s)
            with contextlib.suppress(Broken, TimeoutError):  # it may be gone
                await call(engine.socket, "POST", "/sim/fault", {"set": ""}, 5.0)
        finally:
            harm.ended = time.monotonic()
        return status == 200

    async def _launch_server(self, step: Step) -> bool:
        if not self._daemon.up:
            return False
        servers = (await self._daemon.get("/status"))["launch_servers"]
        pids = [server["pid"] for server in servers.values() if server.get("pid")]
        if not pids:
            return False
        if step.fault.startswith("kill"):
            self._book.hurt(None, step.fault)  # a launch may be under way in it
            return self._signal(pids[0], signal.SIGKILL)
        return await self._hold(pids[:1], None, step)

    # ---- segments and memory --------------------------------------------------------------------------------------

    async def _segment(self, step: Step) -> bool:
        engine = await self._one(step)
        if engine is None or engine.state not in ("ready", "draining", "asleep"):
            return False
        path = Path("/dev/shm") / engine.ipc_name
        match step.fault:
            case "delete-segment":
                path.unlink()
            case "cut-segment":
                os.truncate(path, 8 if step.how < 0.5 else 0)
            case "zero-segment":
                _overwrite(path, bytes(24))
            case _:
                _overwrite(path, struct.pack("=q", engine.bundle_bytes))
        return True

    async def _grab(self, step: Step) -> bool:
        number = int(step.which * len(self._foreign))
        uuid, card = sorted(self._daemon.cards().items())[number]
        free = card - self._daemon.held().get(uuid, 0)
        foreign, size = self._foreign[number], int(free * step.how * 0.9) // MIB * MIB
        if foreign.held_bytes or size <= 0:
            return False
        harm = self._book.harm(None, step.fault)  # a start may find no memory
        try:
            await asyncio.to_thread(foreign.take, size)
            await asyncio.sleep(step.for_s)
            await asyncio.to_thread(foreign.give_all)
        except ForeignError:  # somebody was faster
            return False
        finally:
            harm.ended = time.monotonic()
        return True


def _overwrite(path: Path, data: bytes) -> None:
    """Without its lock: somebody who does that does not know of locks."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
