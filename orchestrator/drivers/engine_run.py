"""One launch as it is now: its process, its log, what was seen of it, and the tasks that work on it. Written by those tasks only.

It reports by being looked at: whoever changes it calls `notify`, which only makes the next look come sooner.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.drivers import kvcached, processes, vllm
from orchestrator.drivers.processes import Child, Process
from orchestrator.drivers.vllm import EngineApi
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, Segment

log = logging.getLogger(__name__)

TAIL_LINES = 30
TAIL_BYTES = 1 << 20  # read of a log at once: more than its last lines, less than a day's


@dataclass
class Run:
    launch: Launch
    folder: Path
    log: Path
    notify: Callable[[], None]
    segment: kvcached.Watched = field(init=False)
    process: Process | None = None
    child: Child | None = None  # None for one that was adopted: not ours to wait for
    alive: bool = True
    ready: bool = False
    gone: bool = False
    adopted: bool = False
    phase: str = "spawning"
    error: str | None = None
    hindered: bool = False  # its error is that the daemon could not start it, and nothing of its own
    hangs: bool = False
    started_at: float = field(default_factory=time.monotonic)
    capacity_bytes: int = 0
    bundle_bytes: int = 0
    asleep: bool = False
    host_bytes: int = 0
    sleep_s: float | None = None
    wake_s: float | None = None
    wanted_limit: int | None = None
    acked_limit: int | None = None
    log_at: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    pids: frozenset[int] = frozenset()
    tasks: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    unwatch: Callable[[], None] = lambda: None
    api: EngineApi | None = None
    undying: str = ""
    facts: tuple[object, ...] = ()
    last_seen: EngineSeen | None = None

    def __post_init__(self) -> None:
        self.segment = kvcached.Watched(self.launch.ipc_name)

    @property
    def model(self) -> str:
        return self.launch.spec.name

    @property
    def socket(self) -> Path:
        return self.folder / "api.sock"

    def seen(self) -> EngineSeen:
        """The same object for as long as nothing changes: all of them are looked at four times a second."""
        facts = (  # in EngineSeen's order
            self.launch.id,
            self.alive,
            self.gone,
            self.ready,
            self.phase,
            self.error,
            tuple(self.tail),
            self.adopted,
            self.process.pid if self.process else None,
            self.pids,
            self.started_at,
            self.segment_now(),
            self.capacity_bytes,
            self.bundle_bytes,
            self.acked_limit,
            self.asleep,
            self.host_bytes,
            self.sleep_s,
            self.wake_s,
            False,
            self.hindered,
            self.undying,
        )
        if self.last_seen is None or facts != self.facts:
            self.facts, self.last_seen = facts, EngineSeen(*facts)
        return self.last_seen

    def segment_now(self) -> Segment | None:
        return None if self.gone else self.segment.read()

    # ---- its process ----------------------------------------------------------------------------------------------

    def has(self, process: Process, child: Child | None) -> None:
        self.process, self.child, self.pids = process, child, frozenset({process.pid})
        self.watch()

    def watch(self) -> None:
        assert self.process is not None
        self.unwatch = processes.on_exit(self.process, self._exited)

    def _exited(self) -> None:
        self.alive = False
        self.read_log()
        if self.error is None and "take down" not in self.tasks:
            self.error = self.how_it_ended()
        self.notify()

    def how_it_ended(self) -> str:
        how = f"its process {processes.how_it_ended(self.child.poll() if self.child is not None else None)}"
        return how if self.ready else f"{how} while {self.phase}"

    def fail(self, why: str) -> None:
        self.read_log()
        self.error = why
        self.notify()

    # ---- its log --------------------------------------------------------------------------------------------------

    def reach(self, phase: str) -> None:
        if vllm.PHASES.index(phase) > vllm.PHASES.index(self.phase):
            self.phase = phase
            self.notify()

    def read_log(self) -> None:
        try:
            with open(self.log, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.log_at = max(0 if size < self.log_at else self.log_at, size - TAIL_BYTES)  # it is smaller where it was begun anew
                file.seek(self.log_at)
                text = file.read(TAIL_BYTES)
        except OSError:
            return
        if self.alive and len(text) < TAIL_BYTES:
            text = text[: text.rfind(b"\n") + 1]  # the rest of its last line is still to come
        self.log_at += len(text)
        for line in text.decode(errors="replace").splitlines():
            if line.strip():
                self.tail.append(line.rstrip()[:500])
            if phase := vllm.phase_in(line):
                self.reach(phase)

    # ---- its tasks ------------------------------------------------------------------------------------------------

    def begin(self, name: str, work: Callable[["Run"], Awaitable[None]]) -> None:
        self.tasks[name] = asyncio.ensure_future(self._guard(name, work))

    def busy(self, name: str) -> bool:
        return name in self.tasks and not self.tasks[name].done()

    async def cancel(self, *names: str) -> None:
        for task in (self.tasks[name] for name in names if self.busy(name)):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _guard(self, name: str, work: Callable[["Run"], Awaitable[None]]) -> None:
        try:
            await work(self)
        except Exception as error:
            log.exception("%s: %s failed", self.model, name)
            self.fail(f"{name}: {type(error).__name__}: {error}")

    # ---- its record -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, object]:
        launch = {**asdict(self.launch), "spec": self.launch.spec.model_dump(mode="json"), "gpus": list(self.launch.gpus)}
        process = [self.process.pid, self.process.create_time] if self.process else None
        return {"launch": launch, "process": process, "boot": processes.boot_id(), "log": str(self.log)}


def from_record(record: Mapping[str, Any], folder: Path, notify: Callable[[], None]) -> Run:
    launch = dict(record["launch"])
    try:
        launch["spec"] = ModelSpec.model_validate(launch["spec"])
    except ValueError:  # of another version: its model is not known any more, so all that is left to do is to end it
        launch["spec"] = ModelSpec.model_construct(**launch["spec"])
    launch["gpus"] = tuple(launch["gpus"])
    run = Run(Launch(**launch), folder, Path(record["log"]), notify, adopted=True)
    if record["process"] and record["boot"] == processes.boot_id():
        run.process = Process(int(record["process"][0]), float(record["process"][1]))
        run.pids = frozenset({run.process.pid})
    return run
