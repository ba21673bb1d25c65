"""Launch servers: for each engine venv one process that has imported vLLM already, and forks engines: 1.5 s instead of 41.

A launch comes back as an engine, or NoFork says why not, and then none was started and none will be (launch_control.py): the caller
starts it by exec, which is slower and otherwise the same.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.drivers import processes, vllm
from orchestrator.drivers.launch_control import Control, Lost, NoFork
from orchestrator.drivers.processes import Child, Process
from orchestrator.drivers.vllm import EngineVenv

log = logging.getLogger(__name__)

READY_S = 90.0  # a launch waits this long for the imports: 14-17 s on an H200 box, several times that from a cold disk
START_S = 300.0  # then the server is ended
START_RETRY_S = 600.0  # what can not be imported now can hardly be imported in a second; in a changed venv it is tried at once
ANSWER_S = 10.0  # a fork takes milliseconds
BACKOFF_S, BACKOFF_MAX_S = 2.0, 60.0  # after the death of one that was ready, or that was killed

# What an engine may have otherwise than its server: read after the fork, or set anew there (engine/vllm/preloaded.py). Anything else may
# have been read while the server imported: kvcached's C++ part keeps KVCACHED_MIN_RESERVED_PAGES, huggingface_hub HF_HUB_OFFLINE.
LATE = re.compile(
    r"KVCACHED_(IPC_NAME|MAX_CACHED_TOKENS|CONTIGUOUS_LAYOUT|LOG_LEVEL)|VLLM_RPC_BASE_PATH|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING"
    r"|NCCL_\w+|HF_TOKEN|SIM_\w+"
)


class LaunchServers:
    """One for each venv that wants one, started by its first launch."""

    def __init__(self, venvs: Mapping[str, EngineVenv], logs: Path) -> None:
        self._venvs, self._logs = venvs, logs
        self._servers: dict[str, LaunchServer] = {}

    async def fork(self, name: str, argv: Sequence[str], env: Mapping[str, str], log_file: Path) -> tuple[Process, Child | None]:
        """An engine of venv `name` whose output goes to `log_file`. Raises NoFork."""
        return await self._server(name).fork(argv, env, log_file)

    def warm(self, names: Iterable[str]) -> None:
        """Have them ready before the first launch."""
        for name in names:
            if name in self._venvs and self._venvs[name].launch_server:
                self._server(name).warm()

    async def status(self) -> dict[str, dict[str, Any]]:
        """By venv: its state (off, starting, ready, failed) and why, host memory now in bytes, what it imported, engines forked so far."""
        wanted = [self._server(name) for name, venv in self._venvs.items() if venv.launch_server]
        return {server.name: await asyncio.to_thread(server.status) for server in wanted}

    async def close(self) -> None:
        """End them; engines live on."""
        for server in self._servers.values():
            await server.close()

    def _server(self, name: str) -> "LaunchServer":
        if name not in self._servers:
            self._servers[name] = LaunchServer(name, self._venvs, self._logs / f"launch-server-{name}.log")
        return self._servers[name]


class LaunchServer:
    """That of one venv: one process after the other, as they die or the venv changes."""

    def __init__(self, name: str, venvs: Mapping[str, EngineVenv], log_file: Path) -> None:
        self.name, self._venvs, self._log = name, venvs, log_file
        self._turn = asyncio.Lock()  # one request at a time
        self._now: Control | None = None
        self._starting: asyncio.Task[None] | None = None
        self._found: object = None  # the venv's fingerprint when it was started last
        self._started_at = self._retry_at = 0.0
        self._reason: str | None = None
        self._deaths = 0  # since the last engine
        self._forks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def fork(self, argv: Sequence[str], env: Mapping[str, str], log_file: Path) -> tuple[Process, Child | None]:
        common = self._environment()
        if early := sorted(key for key in env.keys() | common.keys() if env.get(key) != common.get(key) and not LATE.fullmatch(key)):
            raise NoFork(f"its env has {', '.join(early)}, which is read once, while the launch server imports")
        async with self._turn:
            server = await self._up()
            try:
                engine = await server.fork(argv, env, log_file, ANSWER_S)
            except Lost as error:
                self._lose(server, str(error))
                raise self._no_fork() from None
            self._forks, self._deaths = self._forks + 1, 0
            return engine

    def warm(self) -> None:
        self._beside(self._warm())

    def status(self) -> dict[str, Any]:
        now = self._now
        memory = processes.memory(now.process.pid) if now else None
        said = now.hello if now else {}
        return {
            "state": "ready" if said else "starting" if now else "failed" if self._reason else "off",
            "reason": self._reason,
            "pid": now.process.pid if now else None,
            "rss_bytes": memory[0] if memory else None,
            "pss_bytes": memory[1] if memory else None,
            "import_s": said.get("import_s"),
            "threads": said.get("threads"),
            "versions": said.get("versions", {}),
            "forks": self._forks,
        }

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._starting] if self._starting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._now is not None:
            self._dismiss(self._now)
        await asyncio.gather(*self._ends)

    # ---- there, or the reason why not -----------------------------------------------------------------------------

    async def _up(self) -> Control:
        """The one that is ready. A launch that is given up meanwhile does not end it."""
        venv = self._venvs[self.name]
        found = fingerprint(venv)
        if self._now is not None and self._found != found:
            log.info("launch server %s: its venv has changed, another one takes its place", self.name)
            self._dismiss(self._now)
        if self._now is None:
            if self._found == found and time.monotonic() < self._retry_at:
                raise self._no_fork()
            self._found, self._started_at, self._reason = found, time.monotonic(), None
            try:
                self._now = Control.spawn(venv, self._environment(), self._log)
            except OSError as error:
                self._failed(f"it could not be started: {error}", START_RETRY_S)
                raise self._no_fork() from None
            self._starting = asyncio.create_task(self._start(self._now))
        assert self._starting is not None
        await asyncio.wait([self._starting], timeout=max(0.0, self._started_at + READY_S - time.monotonic()))
        if self._now is None:
            raise self._no_fork()
        if not self._now.hello:
            raise NoFork(f"its launch server still imports after {READY_S:g} s")
        return self._now

    async def _start(self, server: Control) -> None:
        try:
            await server.ready(START_S)
        except Lost as error:
            if server.was_killed:
                self._lose(server, str(error))
            else:
                self._dismiss(server)
                self._failed(f"{error}; see {self._log}", START_RETRY_S)
            return
        server.unwatch = processes.on_exit(server.process, lambda: self._beside(self._died(server)))
        log.info("launch server %s: ready, pid %d, %s", self.name, server.process.pid, _told(server.hello))

    async def _warm(self) -> None:
        async with self._turn:
            with contextlib.suppress(NoFork):
                await self._up()

    def _environment(self) -> dict[str, str]:
        return vllm.venv_environment(self._venvs[self.name], os.environ)

    # ---- its end --------------------------------------------------------------------------------------------------

    async def _died(self, server: Control) -> None:
        async with self._turn:
            if self._now is server:
                self._lose(server, server.how_it_ended())

    def _lose(self, server: Control, why: str) -> None:
        """One that died of nothing in its venv. Another one is started after a while, a longer one each time unless engines were forked."""
        self._dismiss(server)
        wait_s = min(BACKOFF_S * 2 ** min(self._deaths, 10), BACKOFF_MAX_S)
        self._deaths += 1
        self._failed(why, wait_s)
        self._beside(self._revive(wait_s))

    async def _revive(self, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        if self._now is None:
            self._retry_at = 0.0
            await self._warm()

    def _dismiss(self, server: Control) -> None:
        self._now = None
        self._beside(server.end(), self._ends)

    def _failed(self, why: str, retry_s: float) -> None:
        self._reason, self._retry_at = why, time.monotonic() + retry_s
        log.warning("launch server %s: %s; tried again in %.0f s, until then engines are started by exec", self.name, why, retry_s)

    def _no_fork(self) -> NoFork:
        return NoFork(f"its launch server failed: {self._reason}")

    def _beside(self, work: Coroutine[Any, Any, None], others: "set[asyncio.Task[None]] | None" = None) -> None:
        others = self._tasks if others is None else others
        task = asyncio.ensure_future(work)
        others.add(task)
        task.add_done_callback(others.discard)


def fingerprint(venv: EngineVenv) -> object:
    """Another one when another Python, vLLM or kvcached is installed."""
    site = sorted(venv.python.parent.parent.glob("lib/python*/site-packages"))
    packages = (path for folder in site for name in ("vllm", "kvcached") for path in sorted(folder.glob(f"{name}-*.dist-info")))
    return [(str(path), _stamp(path)) for path in (venv.python, *packages)]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _told(hello: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in hello["versions"].items())
    threads = f", {hello['threads']} threads" if hello["threads"] != 1 else ""
    return f"{versions}, imported in {hello['import_s']} s{threads}"
