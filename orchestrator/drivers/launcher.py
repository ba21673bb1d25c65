"""Engines: one launch from its spawn to ready, and from the first signal to "nothing of it is left". Implements control's Engines.

Intent is written before the spawn, so whatever happens to the daemon, the next one knows what may be running. Nothing here
decides: bring-up and take-down are fixed sequences that report only by being looked at.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, Protocol

import httpx2

from orchestrator.drivers import kvcached, processes, vllm
from orchestrator.drivers.processes import Process
from orchestrator.drivers.vllm import EngineApi, EngineVenv
from orchestrator.errors import StoreError
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec, slug
from orchestrator.policy.snapshot import EngineSeen, Segment

log = logging.getLogger(__name__)

POLL_S = 0.1
SEGMENT_TIMEOUT_S = 10.0  # kvcached makes its segment before the server answers; a plain vLLM never does
KEPT_LOGS = 5  # of earlier launches of the same model
TAIL_LINES = 30
TAIL_BYTES = 1 << 20  # read of a log at once: more than its last lines, less than a day's
RETRY_RPC_S = 1.0
SETTLE_S = 0.02  # kvcached's watcher sees the segment every 0.1 s; a limit is not applied before


class EngineRecords(Protocol):
    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None: ...
    async def remove_engine(self, launch_id: str) -> None: ...
    async def engines(self) -> Mapping[str, Mapping[str, Any]]: ...


@dataclass
class _Run:
    """One launch as it is now. Written by its own tasks only."""

    launch: Launch
    folder: Path
    log: Path
    process: Process | None = None
    child: "Popen[bytes] | None" = None
    alive: bool = True
    ready: bool = False
    gone: bool = False
    adopted: bool = False
    phase: str = "spawning"
    error: str | None = None
    started_at: float = field(default_factory=time.monotonic)
    capacity_bytes: int = 0
    bundle_bytes: int = 0
    wanted_limit: int | None = None
    acked_limit: int | None = None
    log_at: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    pids: frozenset[int] = frozenset()
    tasks: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    unwatch: Callable[[], None] = lambda: None
    api: EngineApi | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "api.sock"


class EngineFailed(Exception):
    """It will not become ready; the text says why."""


class Launcher:
    """`limit_writer`: "direct" writes the segment (microseconds); "kvctl" has the engine venv's kvctl do it (3 s a call)."""

    def __init__(
        self,
        venvs: Mapping[str, EngineVenv],
        runtime: Path,
        logs: Path,
        records: EngineRecords,
        notify: Callable[[], None],
        limit_writer: str = "direct",
    ) -> None:
        self._limit_writer = limit_writer
        self._venvs, self._runtime, self._logs, self._records, self._notify = venvs, runtime / "engines", logs, records, notify
        self._runs: dict[str, _Run] = {}

    # ---- control's port -------------------------------------------------------------------------------------------

    async def adopt(self) -> Sequence[Launch]:
        living = []
        for launch_id, record in (await self._records.engines()).items():
            run = _from_record(record, self._runtime / launch_id)
            self._runs[launch_id] = run
            if run.process is None:  # the daemon died between writing the intent and knowing the pid
                leader = processes.writing_to(run.log)
                run.process = leader
            if run.process is not None and processes.alive(run.process):
                self._watch(run)
                self._task(run, "bring up", self._bring_up)
                living.append(run.launch)
            else:
                run.alive = False
                self.stop(launch_id)
        return living

    def start(self, launch: Launch) -> None:
        run = _Run(launch, self._runtime / launch.id, self._logs / f"{_log_stem(launch.spec.name)}.{launch.id}.log")
        self._runs[launch.id] = run
        self._task(run, "bring up", self._bring_up)

    def stop(self, launch_id: str) -> None:
        run = self._runs.get(launch_id)
        if run is not None and "take down" not in run.tasks:
            self._task(run, "take down", self._take_down)

    def set_limit(self, launch_id: str, limit_bytes: int) -> None:
        run = self._runs.get(launch_id)
        if run is None or run.gone:
            raise OSError(f"engine {launch_id} is over")
        if not self._by_kvctl(run):
            kvcached.write_limit(run.launch.ipc_name, limit_bytes)
        if run.acked_limit == limit_bytes:  # it held once; another one came between, ours or a stranger's, so it must be told anew
            run.acked_limit = 0
        run.wanted_limit = limit_bytes
        self._apply_limit(run)

    def trim(self, launch_id: str) -> None:
        self._aside(launch_id, "trim", self._trim)

    def repair(self, launch_id: str) -> None:
        self._aside(launch_id, "repair", self._repair)

    def look(self) -> Mapping[str, EngineSeen]:
        return {launch_id: self._seen(run) for launch_id, run in self._runs.items()}

    def forget(self, launch_id: str) -> None:
        self._runs.pop(launch_id, None)

    def socket(self, launch_id: str) -> str:
        return str(self._runtime / launch_id / "api.sock")

    def log_file(self, model: str) -> Path | None:
        """The newest log of a model, also of an engine that is over."""
        return max(self._logs.glob(f"{_log_stem(model)}.*.log"), key=lambda path: path.stat().st_mtime, default=None)

    # ---- from spawn to ready --------------------------------------------------------------------------------------

    async def _bring_up(self, run: _Run) -> None:
        try:
            if run.process is None:
                await self._spawn(run)
            await self._until_ready(run)
        except (EngineFailed, OSError) as error:
            self._fail(run, str(error))
        except httpx2.HTTPError as error:
            self._fail(run, f"its API failed while it was being checked: {type(error).__name__}: {error}")

    async def _spawn(self, run: _Run) -> None:
        launch = run.launch
        venv = self._venvs.get(launch.spec.engine)
        if venv is None:
            raise EngineFailed(f"there is no engine {launch.spec.engine!r} any more; known: {', '.join(sorted(self._venvs))}")
        if venv.kind == "vllm" and not os.access(venv.python, os.X_OK):
            raise EngineFailed(
                f"engine {launch.spec.engine!r} has no Python at {venv.python}: `make engine` builds one; see engines in the config"
            )
        run.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._drop_old_logs(launch.spec.name)
        await self._records.put_engine(launch.id, _record(run))
        argv = vllm.command(launch, venv, run.socket)
        env = vllm.environment(launch, venv, run.folder, os.environ)
        run.process, run.child = processes.spawn(argv, env, run.log)
        run.pids = frozenset({run.process.pid})
        self._watch(run)
        await self._records.put_engine(launch.id, _record(run))
        self._notify()

    async def _until_ready(self, run: _Run) -> None:
        """READY means: healthy, the right model, a token answered, kvcached seen at work, and our calls answered in the engine."""
        run.api = api = EngineApi(run.socket)
        while not (run.socket.exists() and await api.healthy()):
            if not run.alive:
                raise EngineFailed(self._how_it_ended(run))
            self._read_log(run)
            if run.process is not None:  # all of /proc is walked for it: not on the event loop
                run.pids = run.pids | await asyncio.to_thread(processes.members, run.process)
            await asyncio.sleep(POLL_S)
        self._phase(run, "probing")
        name = run.launch.spec.name
        if name not in (names := await api.names()):
            raise EngineFailed(f"the engine serves {names}, not {name!r}")
        await self._until_segment(run)
        await api.probe(name)
        status = await api.rpc("kv_status")
        run.capacity_bytes, run.bundle_bytes = int(status["capacity_bytes"]), int(status["bundle_bytes"])
        await api.rpc("kv_empty_cache")
        run.pids = await asyncio.to_thread(processes.members, run.process) if run.process else frozenset()
        run.ready = True
        self._phase(run, "ready")
        if run.wanted_limit is None and (segment := kvcached.read(run.launch.ipc_name)) and segment.limit_bytes > 0:
            run.wanted_limit = segment.limit_bytes  # a former daemon may have died before the engine was told
        self._apply_limit(run)

    async def _until_segment(self, run: _Run) -> None:
        deadline = time.monotonic() + SEGMENT_TIMEOUT_S
        while (segment := kvcached.read(run.launch.ipc_name)) is None or segment.used_bytes == 0:
            if time.monotonic() > deadline:
                if segment is None:
                    raise EngineFailed(
                        f"kvcached is not active: no segment /dev/shm/{run.launch.ipc_name}; is kvcached in the engine's venv?"
                    )
                raise EngineFailed("kvcached got no memory for its first page: the GPU is full")
            if not run.alive:
                raise EngineFailed(self._how_it_ended(run))
            await asyncio.sleep(POLL_S)

    async def _trim(self, run: _Run) -> None:
        assert run.api is not None
        await run.api.reset_prefix_cache()
        await run.api.rpc("kv_trim")
        await run.api.rpc("kv_empty_cache")

    async def _repair(self, run: _Run) -> None:
        assert run.api is not None
        status = await run.api.rpc("kv_status")
        limit = run.wanted_limit or int(status["limit_bytes"])
        kvcached.restore(
            run.launch.ipc_name, Segment(limit, int(status["used_bytes"]), int(status["mapped_bytes"]) - int(status["used_bytes"]))
        )

    def _aside(self, launch_id: str, name: str, work: Callable[[_Run], Coroutine[Any, Any, None]]) -> None:
        """Run one thing beside the others, if the engine can be asked; a failure is logged, and the next look shows it."""

        async def told(run: _Run) -> None:
            try:
                await work(run)
            except (httpx2.HTTPError, OSError, KeyError, ValueError) as error:
                log.warning("%s: %s failed: %s: %s", run.launch.spec.name, name, type(error).__name__, error)
            self._notify()

        run = self._runs.get(launch_id)
        if run is not None and run.ready and run.alive and not self._running(run, name):
            self._task(run, name, told)

    def _by_kvctl(self, run: _Run) -> bool:
        venv = self._venvs.get(run.launch.spec.engine)
        return self._limit_writer == "kvctl" and venv is not None and (venv.python.parent / "kvctl").exists()

    async def _kvctl(self, run: _Run, limit_bytes: int) -> None:
        """`kvctl limit`, then read back: it exits 0 whatever happens."""
        kvctl = self._venvs[run.launch.spec.engine].python.parent / "kvctl"
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

    def _apply_limit(self, run: _Run) -> None:
        """Have the engine apply what the segment says: by itself it would do so only in its next allocation, a starved one never."""
        if run.ready and run.acked_limit != run.wanted_limit and not self._running(run, "apply limit"):
            self._task(run, "apply limit", self._until_applied)

    async def _until_applied(self, run: _Run) -> None:
        assert run.api is not None
        while run.alive and run.wanted_limit is not None and run.acked_limit != run.wanted_limit:
            wanted = run.wanted_limit
            try:
                if self._by_kvctl(run) and (segment := kvcached.read(run.launch.ipc_name)) and segment.limit_bytes != wanted:
                    await self._kvctl(run, wanted)
                answer = await run.api.rpc("kv_limit", wanted, time.monotonic_ns())  # counts from boot: never back
            except (httpx2.HTTPError, OSError, KeyError, ValueError) as error:
                log.warning("%s: the engine did not take its limit: %s", run.launch.spec.name, error)
                await asyncio.sleep(RETRY_RPC_S)
                continue
            if answer.get("settled") is False:
                await asyncio.sleep(SETTLE_S)
            elif answer.get("status") in ("applied", "deferred"):  # deferred: use is above it, it drains as requests finish
                run.acked_limit = wanted
            else:
                log.warning(
                    "%s: limit %d: the engine answered %s %s", run.launch.spec.name, wanted, answer.get("status"), answer.get("reason")
                )
                await asyncio.sleep(RETRY_RPC_S)
        self._notify()

    # ---- from the first signal to nothing left --------------------------------------------------------------------

    async def _take_down(self, run: _Run) -> None:
        for name in ("bring up", "apply limit", "trim", "repair"):
            await _cancel(run.tasks.get(name))
        if run.api is not None:
            await run.api.close()
        if run.process is not None:
            await self._end_session(run, run.process)
        run.alive = False
        self._read_log(run)
        shutil.rmtree(run.folder, ignore_errors=True)
        try:
            kvcached.remove(run.launch.ipc_name)
            await self._records.remove_engine(run.launch.id)
        except (OSError, StoreError) as error:  # its memory is back all the same; the record makes the next daemon try again
            log.warning("%s: what engine %s left was not removed: %s", run.launch.spec.name, run.launch.id, error)
        run.gone = True
        self._notify()

    async def _end_session(self, run: _Run, process: Process) -> None:
        """SIGTERM to all of it, then SIGKILL until nobody is left: SIGKILL of an API server alone would orphan its EngineCore."""
        grace_s = self._venvs[run.launch.spec.engine].stop_grace_s if run.launch.spec.engine in self._venvs else 10.0
        kill_at = time.monotonic() + grace_s
        number = signal.SIGTERM
        sent_at = -1e9
        while True:
            left = await asyncio.to_thread(processes.members, process)
            run.pids = run.pids | left  # NVML may show a dead process for seconds
            # A leader whose main thread has ended looks like a zombie while its other threads run: it is over when it can be reaped.
            reaped = run.child is None or run.child.poll() is not None
            if not left and reaped:
                return
            if number is signal.SIGTERM and time.monotonic() >= kill_at:
                number, sent_at = signal.SIGKILL, -1e9
            if sent_at < 0 or (number is signal.SIGKILL and time.monotonic() - sent_at > 1.0):
                processes.signal_session(process, number)
                if run.child is not None and number is signal.SIGKILL:
                    run.child.kill()
                sent_at = time.monotonic()
            await asyncio.sleep(POLL_S / 2)

    # ---- looking --------------------------------------------------------------------------------------------------

    def _seen(self, run: _Run) -> EngineSeen:
        return EngineSeen(
            launch_id=run.launch.id,
            alive=run.alive,
            gone=run.gone,
            ready=run.ready,
            phase=run.phase,
            error=run.error,
            log_tail=tuple(run.tail),
            adopted=run.adopted,
            pid=run.process.pid if run.process else None,
            pids=run.pids,
            started_at=run.started_at,
            segment=None if run.gone else kvcached.read(run.launch.ipc_name),
            capacity_bytes=run.capacity_bytes,
            bundle_bytes=run.bundle_bytes,
            acked_limit_bytes=run.acked_limit,
        )

    def _watch(self, run: _Run) -> None:
        assert run.process is not None
        run.unwatch = processes.on_exit(run.process, lambda: self._exited(run))

    def _exited(self, run: _Run) -> None:
        run.alive = False
        self._read_log(run)
        if run.error is None and "take down" not in run.tasks:
            run.error = self._how_it_ended(run)
        self._notify()

    def _how_it_ended(self, run: _Run) -> str:
        code = run.child.poll() if run.child is not None else None
        return (
            f"its process {processes.how_it_ended(code)} while {run.phase}"
            if not run.ready
            else f"its process {processes.how_it_ended(code)}"
        )

    def _fail(self, run: _Run, why: str) -> None:
        self._read_log(run)
        run.error = why
        self._notify()

    def _phase(self, run: _Run, phase: str) -> None:
        if vllm.PHASES.index(phase) > vllm.PHASES.index(run.phase):
            run.phase = phase
            self._notify()

    def _read_log(self, run: _Run) -> None:
        try:
            with open(run.log, "rb") as file:
                run.log_at = max(run.log_at, os.fstat(file.fileno()).st_size - TAIL_BYTES)
                file.seek(run.log_at)
                text = file.read(TAIL_BYTES)
        except OSError:
            return
        if run.alive and len(text) < TAIL_BYTES:
            text = text[: text.rfind(b"\n") + 1]  # the rest of its last line is still to come
        run.log_at += len(text)
        for line in text.decode(errors="replace").splitlines():
            if line.strip():
                run.tail.append(line.rstrip()[:500])
            if phase := vllm.phase_in(line):
                self._phase(run, phase)

    def _drop_old_logs(self, model: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        old = sorted(self._logs.glob(f"{_log_stem(model)}.*.log"), key=lambda path: path.stat().st_mtime)
        for path in old[: -KEPT_LOGS or None]:
            path.unlink(missing_ok=True)

    def _running(self, run: _Run, name: str) -> bool:
        return name in run.tasks and not run.tasks[name].done()

    def _task(self, run: _Run, name: str, work: Callable[[_Run], Awaitable[None]]) -> None:
        run.tasks[name] = asyncio.ensure_future(self._guard(run, name, work))

    async def _guard(self, run: _Run, name: str, work: Callable[[_Run], Awaitable[None]]) -> None:
        try:
            await work(run)
        except Exception as error:
            log.exception("%s: %s failed", run.launch.spec.name, name)
            self._fail(run, f"{name}: {type(error).__name__}: {error}")


def _log_stem(model: str) -> str:
    """What the names of a model's logs begin with. The digest tells apart models whose slugs are the same."""
    return f"{slug(model)}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def _record(run: _Run) -> dict[str, object]:
    launch = {**asdict(run.launch), "spec": run.launch.spec.model_dump(mode="json"), "gpus": list(run.launch.gpus)}
    process = [run.process.pid, run.process.create_time] if run.process else None
    return {"launch": launch, "process": process, "boot": processes.boot_id(), "log": str(run.log)}


def _from_record(record: Mapping[str, Any], folder: Path) -> _Run:
    launch = dict(record["launch"])
    launch["spec"] = ModelSpec.model_validate(launch["spec"])
    launch["gpus"] = tuple(launch["gpus"])
    run = _Run(Launch(**launch), folder, Path(record["log"]), adopted=True)
    if record["process"] and record["boot"] == processes.boot_id():
        run.process = Process(int(record["process"][0]), float(record["process"][1]))
        run.pids = frozenset({run.process.pid})
    return run


async def _cancel(task: "asyncio.Task[None] | None") -> None:
    if task is not None and not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
