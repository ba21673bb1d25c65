"""Engines: one launch from its spawn to ready, and from the first signal to "nothing of it is left". Implements control's Engines.

Intent is written before the spawn, so whatever happens to the daemon, the next one knows what may be running. Nothing here
decides: bring-up and take-down are fixed sequences that report only by being looked at.
"""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx2

from orchestrator.drivers import engine_run, kvcached, leftovers, log_files, processes, pulse, upkeep, vllm
from orchestrator.drivers.engine_run import Run
from orchestrator.drivers.launch_control import NoFork
from orchestrator.drivers.launch_server import LaunchServers
from orchestrator.drivers.processes import Child, Process
from orchestrator.drivers.vllm import EngineApi, EngineVenv
from orchestrator.errors import StoreError
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import slug
from orchestrator.policy.snapshot import EngineSeen, Segment

log = logging.getLogger(__name__)

POLL_S = 0.1
HEALTH_POLL_S = 0.02  # somebody waits for it; a look at a socket that nobody listens at takes 0.3 ms
SEGMENT_TIMEOUT_S = 10.0  # kvcached makes its segment before the server answers; a plain vLLM never does
SERVED_S = 20.0  # a busy API server answers /health in a second; one that does not answer for this long hangs
LONG_S = 10.0  # SIGKILL takes milliseconds, 4 s where a driver unmaps a whole card
HINDRANCES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
STRANGE_S = 7 * 86400.0  # so long the logs of a model stay that was removed
KEPT_LOGS = 5  # of earlier launches of the same model


class EngineRecords(Protocol):
    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None: ...
    async def remove_engine(self, launch_id: str) -> None: ...
    async def engines(self) -> Mapping[str, Mapping[str, Any]]: ...


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
        self._servers = LaunchServers(venvs, logs)
        self._told: set[str] = set()  # why engines were not forked
        self._runs: dict[str, Run] = {}
        self._served: set[str] = set()  # launches that were ready under a former daemon

    # ---- control's port -------------------------------------------------------------------------------------------

    async def adopt(self) -> Sequence[Launch]:
        """All that a former daemon of these folders left: what records name and still runs is taken over, everything else ended and cleaned
        up after. What another daemon has is in other folders."""
        records = await self._records.engines()
        leftovers.end_launch_servers(self._logs)
        for folder in leftovers.unrecorded(self._runtime, records.keys()):
            self._runs[folder.name] = leftovers.run(folder, self._logs, self._notify)
            log.warning("engine %s: a former launch that no record names: it is ended", folder.name)
            self.stop(folder.name)
        living: dict[str, Run] = {}
        for launch_id, record in records.items():
            run = engine_run.from_record(record, self._runtime / launch_id, self._notify)
            self._runs[launch_id] = run
            if run.process is None:  # the daemon died between writing the intent and knowing the pid
                run.process = processes.writing_to(run.log)
            if run.process is None or not processes.alive(run.process):
                run.alive = False
                self.stop(launch_id)
                continue
            if not run.folder.is_dir():  # systemd removes it with a service that is stopped: nobody can reach this one any more
                log.warning("%s: engine %s lives and its socket was removed: it is ended", run.model, launch_id)
                self.stop(launch_id)
                continue
            if record.get("served"):
                self._served.add(launch_id)
            other = living.get(run.model)
            if other is not None:  # one model has one engine: the later
                run, other = sorted((run, other), key=_started)[::-1]
                self.stop(other.launch.id)
            living[run.model] = run
        for run in living.values():
            self._take_over(run)
        return [run.launch for run in living.values()]

    def _take_over(self, run: Run) -> None:
        assert run.process is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended since: seen at once
            _, run.child = processes.forked(run.process.pid)  # ours to bury, where this process was the former daemon
        run.watch()
        run.begin("bring up", self._bring_up)

    def start(self, launch: Launch) -> None:
        log_file = self._logs / f"{_log_stem(launch.spec.name)}.{launch.id}.log"
        run = self._runs[launch.id] = Run(launch, self._runtime / launch.id, log_file, self._notify)
        run.begin("bring up", self._bring_up)

    def stop(self, launch_id: str) -> None:
        run = self._runs.get(launch_id)
        if run is not None and "take down" not in run.tasks:
            run.begin("take down", self._take_down)

    def set_limit(self, launch_id: str, limit_bytes: int) -> None:
        run = self._runs.get(launch_id)
        if run is None or run.gone:
            raise OSError(f"engine {launch_id} is over")
        upkeep.set_limit(run, limit_bytes, self._kvctl(run))

    def sleep(self, launch_id: str, level: int) -> None:
        if run := self._runs.get(launch_id):
            upkeep.sleep(run, level)

    def wake(self, launch_id: str) -> None:
        if run := self._runs.get(launch_id):
            upkeep.wake(run)

    def trim(self, launch_id: str) -> None:
        if run := self._runs.get(launch_id):
            upkeep.trim(run)

    def repair(self, launch_id: str) -> None:
        if run := self._runs.get(launch_id):
            upkeep.repair(run)

    def look(self) -> Mapping[str, EngineSeen]:
        processes.reap()
        return {launch_id: run.seen() for launch_id, run in self._runs.items()}

    def segments(self) -> Mapping[str, Segment | None]:
        return {launch_id: run.segment.again() for launch_id, run in self._runs.items()}

    def forget(self, launch_id: str) -> None:
        self._runs.pop(launch_id, None)
        self._served.discard(launch_id)

    # ---- the daemon's ---------------------------------------------------------------------------------------------

    def socket(self, launch_id: str) -> str:
        return str(self._runtime / launch_id / "api.sock")

    def log_file(self, model: str) -> Path | None:
        """The newest log of a model, also of an engine that is over."""
        return next(iter(self.log_files(model)), None)

    def log_files(self, model: str) -> list[Path]:
        """All logs of a model that are kept, of the newest launch first."""
        found = []
        for path in self._logs.glob(f"{_log_stem(model)}.*.log"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(found, reverse=True)]

    async def drop_logs(self, models: Iterable[str]) -> None:
        """Remove those of models that are not among these, and that nobody has written to for a week."""
        stems = {_log_stem(model) for model in (*models, *(run.model for run in self._runs.values()))}
        await asyncio.to_thread(log_files.drop, self._logs, stems, time.time() - STRANGE_S)

    async def cap_logs(self, most_bytes: int) -> None:
        """Have each log of more than that begin anew, those of engines that were adopted too: see log_files.py."""
        begun = await asyncio.to_thread(log_files.cap, self._logs, most_bytes)
        for run in self._runs.values():
            if run.log in begun:
                run.log_at = 0

    def warm(self, venvs: Iterable[str]) -> None:
        """Have the launch servers of these venvs import before the first launch."""
        self._servers.warm(venvs)

    async def launch_servers(self) -> dict[str, dict[str, Any]]:
        return await self._servers.status()

    async def close(self) -> None:
        """End the launch servers; engines live on."""
        await self._servers.close()

    # ---- from spawn to ready --------------------------------------------------------------------------------------

    async def _bring_up(self, run: Run) -> None:
        try:
            if run.process is None:
                await self._spawn(run)
            await self._until_ready(run)
        except StoreError as error:
            run.hindered = True
            run.fail(str(error))
        except OSError as error:
            run.hindered = run.process is None and error.errno in HINDRANCES
            run.fail(str(error))
        except EngineFailed as error:
            run.fail(str(error))
        except httpx2.HTTPError as error:
            run.fail(f"its API failed while it was being checked: {type(error).__name__}: {error}")
        else:
            self._feel_pulse(run)

    async def _spawn(self, run: Run) -> None:
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
        await self._records.put_engine(launch.id, run.record())
        process, child = await self._process(run, venv)
        run.started_at = time.monotonic()  # what it shows of its start is learned: the launch server's imports are no part of it
        run.has(process, child)
        with contextlib.suppress(StoreError):  # the intent is written: the next daemon finds it by its log
            await self._records.put_engine(launch.id, run.record())
        self._notify()

    async def _process(self, run: Run, venv: EngineVenv) -> tuple[Process, Child | None]:
        """Forked from the venv's launch server where that works, else by exec."""
        name = run.launch.spec.engine
        argv = vllm.command(run.launch, venv, run.socket)
        env = vllm.environment(run.launch, venv, run.folder, os.environ)
        if venv.launch_server:
            try:
                return await self._servers.fork(name, argv, env, run.log)
            except NoFork as why:
                if str(why) not in self._told:
                    self._told.add(str(why))
                    log.warning("%s: started by exec of engine %s, not forked: %s", run.model, name, why)
        return processes.spawn(argv, env, run.log)

    async def _until_ready(self, run: Run) -> None:
        """READY means: healthy, the right model, a token answered, kvcached seen at work, and our calls answered in the engine."""
        run.api = api = EngineApi(run.socket)
        looked_at = 0.0
        patient_until = time.monotonic() + (SERVED_S if run.launch.id in self._served else float("inf"))
        while not (run.socket.exists() and await api.healthy()):
            if not run.alive:
                raise EngineFailed(run.how_it_ended())
            if time.monotonic() > patient_until:
                raise EngineFailed(f"it served under the former daemon, and has not answered this one for {SERVED_S:.0f} s")
            if time.monotonic() - looked_at >= POLL_S:
                run.read_log()
                if run.process is not None:  # all of /proc is walked for it: not on the event loop
                    run.pids = run.pids | await asyncio.to_thread(processes.members, run.process)
                looked_at = time.monotonic()
            await asyncio.sleep(HEALTH_POLL_S)
        run.reach("probing")
        if run.model not in (names := await api.names()):
            raise EngineFailed(f"the engine serves {names}, not {run.model!r}")
        await self._until_segment(run)
        if run.adopted:  # it may have slept before, and keeps what that pinned
            run.asleep = await api.sleeping()
            run.host_bytes = int((await api.rpc("kv_host_memory"))["host_bytes"])
        if not run.asleep:
            await api.probe(run.model)
        status = await api.rpc("kv_status")
        run.capacity_bytes, run.bundle_bytes = int(status["capacity_bytes"]), int(status["bundle_bytes"])
        if not run.asleep:
            await api.rpc("kv_empty_cache")
        run.pids = await asyncio.to_thread(processes.members, run.process) if run.process else frozenset()
        run.ready = True
        run.reach("ready")
        if run.wanted_limit is None and (segment := kvcached.read(run.launch.ipc_name)) and segment.limit_bytes > 0:
            run.wanted_limit = segment.limit_bytes  # a former daemon may have died before the engine was told
        upkeep.apply_limit(run, self._kvctl(run))
        if run.launch.id not in self._served:
            with contextlib.suppress(StoreError):  # then the next daemon waits longer for one that hangs
                await self._records.put_engine(run.launch.id, {**run.record(), "served": True})

    async def _until_segment(self, run: Run) -> None:
        deadline = time.monotonic() + SEGMENT_TIMEOUT_S
        while (segment := kvcached.read(run.launch.ipc_name)) is None or segment.used_bytes == 0:
            if time.monotonic() > deadline:
                if segment is None:
                    raise EngineFailed(
                        f"kvcached is not active: no segment /dev/shm/{run.launch.ipc_name}; is kvcached in the engine's venv?"
                    )
                raise EngineFailed("kvcached got no memory for its first page: the GPU is full")
            if not run.alive:
                raise EngineFailed(run.how_it_ended())
            await asyncio.sleep(POLL_S)

    def _feel_pulse(self, run: Run) -> None:
        venv = self._venvs.get(run.launch.spec.engine)
        hang_s = venv.hang_s if venv is not None else vllm.HANG_S
        if hang_s is not None:
            run.begin("pulse", lambda run: pulse.watch(run, hang_s))

    def _kvctl(self, run: Run) -> Path | None:
        """The tool that is to write its limits, if any is."""
        venv = self._venvs.get(run.launch.spec.engine)
        if self._limit_writer != "kvctl" or venv is None:
            return None
        tool = venv.python.parent / "kvctl"
        return tool if tool.exists() else None

    def _drop_old_logs(self, model: str) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        for path in self.log_files(model)[KEPT_LOGS:]:
            log_files.remove(path)

    # ---- from the first signal to nothing left --------------------------------------------------------------------

    async def _take_down(self, run: Run) -> None:
        await run.cancel("bring up", "pulse", "apply limit", "trim", "repair", "sleep", "wake")
        if run.api is not None:
            await run.api.close()
        if run.process is not None:
            await self._end_session(run, run.process)
        run.alive = False
        run.read_log()
        shutil.rmtree(run.folder, ignore_errors=True)
        try:
            kvcached.remove(run.launch.ipc_name)
            await self._records.remove_engine(run.launch.id)
        except (OSError, StoreError) as error:  # its memory is back all the same; the record makes the next daemon try again
            log.warning("%s: what engine %s left was not removed: %s", run.model, run.launch.id, error)
        run.segment.close()
        run.gone = True
        self._notify()

    async def _end_session(self, run: Run, process: Process) -> None:
        """SIGTERM to all of it, then SIGKILL until nobody is left: SIGKILL of an API server alone would orphan its EngineCore.

        One that hangs has nothing to finish. One that SIGKILL does not end (the kernel's state D) is waited for: its memory is not back.
        """
        grace_s = self._venvs[run.launch.spec.engine].stop_grace_s if run.launch.spec.engine in self._venvs else 10.0
        kill_at = time.monotonic() + (0.0 if run.hangs else grace_s)
        number = signal.SIGTERM
        sent_at = -1e9
        undying: frozenset[int] = frozenset()
        while True:
            left = await asyncio.to_thread(processes.members, process)
            run.pids = run.pids | left  # NVML may show a dead process for seconds
            # A leader whose main thread has ended looks like a zombie while its other threads run: it is over when it can be reaped.
            reaped = run.child is None or run.child.poll() is not None
            if not left and reaped:
                run.undying = ""
                return
            if left != undying and time.monotonic() > kill_at + LONG_S:
                undying, run.undying = left, ", ".join(map(processes.who_and_how, sorted(left)))
                log.error("%s: SIGKILL does not end %s: what they hold counts as used until they end", run.model, run.undying)
                self._notify()
            if number is signal.SIGTERM and time.monotonic() >= kill_at:
                number, sent_at = signal.SIGKILL, -1e9
            if sent_at < 0 or (number is signal.SIGKILL and time.monotonic() - sent_at > 1.0):
                processes.signal_session(process, number)
                if run.child is not None and number is signal.SIGKILL:
                    run.child.kill()
                sent_at = time.monotonic()
            await asyncio.sleep(POLL_S / 2)


def _started(run: Run) -> float:
    return run.process.create_time if run.process is not None else 0.0


def _log_stem(model: str) -> str:
    """What the names of a model's logs begin with. The digest tells apart models whose slugs are the same."""
    return f"{slug(model)}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
