"""Faults of the daemon itself, of its disk and of its config file: one at a time, and each is over when the daemon serves again."""

import asyncio
import contextlib
import importlib.util
import json
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.chaos.book import Book, Entry, Span
from bench.chaos.commands import Operator
from bench.chaos.daemon import Daemon, session
from bench.chaos.http import Broken, call
from bench.chaos.schedule import Step

BAD_FILES = ('{"modles": {}}', "models: [", '{"models": {"x": {"sauce": "y"}}}', '{"loop": {"interval": "often"}}')
RELOAD_TRIES = 20  # a disk is full for 6 s at most
RELOADS = importlib.util.find_spec("orchestrator.reload") is not None


@dataclass(frozen=True)
class Engine:
    model: str
    launch_id: str
    pid: int
    ipc_name: str
    socket: Path
    state: str
    bundle_bytes: int


class DaemonFaults:
    """`models`: of the config file. `engines`: those with a process. `back_s`: how long each new daemon took to answer."""

    def __init__(
        self, daemon: Daemon, book: Book, operator: Operator, models: dict[str, Any], engines: Callable[[], Awaitable[list[Engine]]]
    ) -> None:
        self._daemon, self._book, self._operator, self._base, self._engines = daemon, book, operator, models, engines
        self._turn = asyncio.Lock()
        self.problems: list[str] = []
        self.back_s: list[float] = []

    async def kill(self, step: Step) -> bool:
        async with self._turn:
            before = [engine for engine in await self._engines() if engine.state == "ready"]
            self._daemon.kill()
            died = time.monotonic()
            await asyncio.sleep(step.for_s if step.how < 0.5 else 0.0)
            living = [e for e in before if len([p for p in self._daemon.engine_processes() if session(p) == e.pid]) == 2]
            self.back_s.append(await self._daemon.start())
            after = {engine.launch_id for engine in await self._engines()}
            for engine in living:
                if engine.launch_id not in after and not self._book.why(engine.model, died - 20.0, time.monotonic()):
                    self.problems.append(
                        f"{engine.model}: engine {engine.launch_id} lived when the daemon was started again, and was not adopted"
                    )
            return True

    async def stop(self, step: Step) -> bool:
        async with self._turn:
            assert self._daemon.process is not None
            self._daemon.is_down()
            self._daemon.process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(step.for_s)
            finally:
                self._daemon.process.send_signal(signal.SIGCONT)
                self._daemon.is_up()
            return True

    async def end(self, step: Step) -> bool:
        async with self._turn:
            self._book.hurt(None, step.fault)
            status = await self._daemon.end()
            if status != 0:
                self.problems.append(f"the daemon was told to end, and ended with {status}")
            if left := {k: v for k, v in self._daemon.remains().items() if k != "GPU bytes"}:
                self.problems.append(f"the daemon ended in order and left {left}")
            await asyncio.sleep(step.for_s if step.how < 0.5 else 0.0)
            await self._daemon.start()
            self._book.hurt(None, step.fault)
            return True

    async def restart(self, step: Step) -> bool:
        """Its process stays; it is back when it says that it is up for less long than before."""
        async with self._turn, self._operator.turn:
            asked = time.monotonic()
            self._daemon.is_down()
            try:
                status, _ = await call(self._daemon.admin, "POST", "/api/v1/restart?keep_engines=true")
                while status == 202 and time.monotonic() < asked + 60.0:
                    if self._daemon.process is not None and self._daemon.process.poll() is not None:
                        self._daemon.refused.append("restarted by itself, it ended")
                        await self._daemon.start()
                        break
                    with contextlib.suppress(Broken, TimeoutError, RuntimeError):
                        if (await self._daemon.get("/status", 5.0))["uptime_s"] < time.monotonic() - asked:
                            break
                    await asyncio.sleep(0.05)
                else:
                    self.problems.append(f"restart-daemon was answered {status}, and it is not back after {time.monotonic() - asked:.0f} s")
            finally:
                self._daemon.is_up()
            return status == 202

    # ---- the disk and the config file -----------------------------------------------------------------------------

    async def fill(self, step: Step) -> bool:
        path = self._daemon.state / "fill"
        if not self._daemon.small_disk or path.exists():
            return False
        harm = self._book.harm(None, step.fault)  # no engine can be recorded, so none can start
        try:
            await asyncio.to_thread(_fill, path)
            await asyncio.sleep(step.for_s)
        finally:
            path.unlink(missing_ok=True)
            harm.ended = time.monotonic()
        return True

    async def reload(self, step: Step) -> bool:
        """One of four files: as it was; another weight; another argument; one more model."""
        variant = int(step.which * 4)
        models = {name: dict(spec) for name, spec in self._base.items()}
        one, two, extra = (self._operator.name(role) for role in ("f-one", "f-two", "f-extra"))
        if variant == 1:
            models[one]["kv_weight"] = 1.0 + step.how
        if variant == 2:
            models[two]["args"] = ["--max-model-len", str(4096 if step.how < 0.5 else 3072)]
        if variant == 3:
            models[extra] = {"source": str(self._daemon.tiny)}
        async with self._turn, self._operator.turn:
            if not self._daemon.up:
                return False
            self._daemon.config.write_text(json.dumps({"models": models}))
            self._book.hurt(two, "its spec may be another one")
            began = time.monotonic()
            spans = self._book.names.setdefault(extra, [])
            if variant == 3:
                spans.append(Span(extra, began))
            for span in spans:
                span.sure_to = min(span.sure_to, began) if variant != 3 else span.sure_to
            good = await self._reloaded(by_signal=step.how >= 0.5)
            now = time.monotonic()
            if not good:
                self._book.unsure.add(extra)
            elif variant == 3:  # never surely its: a signal that a held daemon heeds later reads whatever file is there then
                self._book.models.setdefault(extra, Entry(None, unsure={"held", "pinned", "weight"}))
            else:
                self._book.models.pop(extra, None)
                self._book.unsure.discard(extra)
                self._book.hurt(extra, "removed by a reload")
                for span in spans:
                    span.maybe_to = min(span.maybe_to, now)
            return good

    async def _reloaded(self, by_signal: bool) -> bool:
        """Until it is: where the state file can not be read now the daemon goes on with what it had, and would start with the new file."""
        said: object = None
        for _ in range(RELOAD_TRIES):
            with contextlib.suppress(Broken, TimeoutError):
                if by_signal:
                    if await self._hung_up():
                        return True
                else:
                    status, said = await call(self._daemon.admin, "POST", "/api/v1/reload")
                    if status == 200:
                        return True
            await asyncio.sleep(0.5)
        self.problems.append(f"a good config file was not reloaded: {said}")
        return False

    async def _hung_up(self) -> bool:
        """By signal; its log says when it is done."""
        assert self._daemon.process is not None
        size = self._daemon.log.stat().st_size
        self._daemon.process.send_signal(signal.SIGHUP)
        for _ in range(400):
            await asyncio.sleep(0.05)
            said = _after(self._daemon.log, size)
            if b"reloaded: " in said or b"not reloaded" in said:
                return b"not reloaded" not in said
        return False

    async def bad_reload(self, step: Step) -> bool:
        async with self._turn, self._operator.turn:
            if not self._daemon.up:
                return False
            good = self._daemon.config.read_text()
            bad = BAD_FILES[int(step.which * len(BAD_FILES))]
            try:
                self._daemon.config.write_text(bad)
                status, answer = await call(self._daemon.admin, "POST", "/api/v1/reload")
            finally:
                self._daemon.config.write_text(good)
            if status != 422:
                self.problems.append(f"the config file {bad!r} was reloaded: {status} {answer}")
            return True


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _after(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(size)
        return file.read()
