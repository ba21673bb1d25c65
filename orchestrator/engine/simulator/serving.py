"""Runs the HTTP server until it is told to stop or EngineCore is gone, and ends the process as vLLM's API server ends.

SIGTERM ends EngineCore, then this process, exit 0. When EngineCore dies, `/health` is 503 until the watchdog looks,
and the exit status is 0 all the same: any exit that nobody asked for is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from .args import EngineArgs
from .client import EngineClient
from .console import Console
from .environment import Environment
from .segment import unlink_segment
from .server import Api

_CORE_END_S = 1.0
_POLL_S = 0.002


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Serving:
    """The API server's life after EngineCore said that it is ready; `hello` is what it said."""

    def __init__(self, args: EngineArgs, env: Environment, core: int, hello: dict[str, Any]) -> None:
        self._args = args
        self._env = env
        self._core = core
        self._hello = hello["ready"]
        self._stats = hello["stats"]
        self._console = Console("APIServer")
        self._signals: set[asyncio.Task[None]] = set()
        self._stopping = False

    def run(self, listener: socket.socket, channel: socket.socket) -> int:
        _log_to_stdout(access_log=self._args.access_log)
        self._client = EngineClient(channel, self._stats, self._console)
        self._api = Api(self._args, self._env, self._client, self._hello["max_model_len"])
        config = uvicorn.Config(
            self._api.app(),
            log_config=None,
            lifespan="on",
            timeout_keep_alive=self._env.keep_alive_s,
            h11_max_incomplete_event_size=4 * 2**20,
            ws="websockets-sansio",
        )
        self._server = _Server(config)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(self._serve(listener))
        return 0

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        reading = asyncio.create_task(self._client.run())
        watching = asyncio.create_task(self._watch_core())
        address = f"unix:{self._args.uds}" if self._args.uds else f"http://{self._args.host}:{self._args.port}"
        self._console.info("api_server.py:567", f"Starting vLLM server on {address}")
        await self._server.serve(sockets=[listener])
        for task in (reading, watching):
            task.cancel()

    def _on_signal(self) -> None:
        if "ignore_sigterm" in self._api.faults:
            return
        if "orphan_core" in self._api.faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._stopping:
            self._stopping = True
            self._signals.add(asyncio.create_task(self._stop()))

    async def _stop(self) -> None:
        """Stop accepting, let requests finish for --shutdown-timeout seconds, end EngineCore, end."""
        timeout_s = self._args.shutdown_timeout_s
        mode = "drain" if timeout_s else "abort"
        text = f"[shutdown] API server: stopping engine client mode={mode} timeout={timeout_s:g}s"
        self._console.info("launcher.py:119", text)
        for server in self._server.servers:
            server.close()
        if timeout_s:
            self._server.config.timeout_graceful_shutdown = int(timeout_s) or 1
            await self._server.shutdown()
        end_core(self._core)
        self._console.info("launcher.py:127", "[shutdown] API server: engine client stopped")
        _exit()

    async def _watch_core(self) -> None:
        await self._client.dead.wait()
        if self._stopping:
            return
        await asyncio.sleep(self._env.core_watchdog_s)
        end_core(self._core)
        if self._hello["segment"]:
            unlink_segment(Path(self._hello["segment"]), self._hello["inode"])  # A killed engine could not.
        self._console.plain("INFO:     Shutting down")
        _exit()


def end_core(core: int) -> int:
    """SIGTERM, then SIGKILL; the exit status of EngineCore as Python's subprocess would give it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(core, signal.SIGTERM)
    deadline = time.monotonic() + _CORE_END_S
    while True:
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(core, os.WNOHANG)
            if not pid and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            if not pid:
                os.kill(core, signal.SIGKILL)
                _, status = os.waitpid(core, 0)
            return os.waitstatus_to_exitcode(status)
        return 0


def _exit() -> None:
    """At once and with status 0, whatever connections are open: as vLLM ends."""
    sys.stdout.flush()
    os._exit(0)


def _log_to_stdout(*, access_log: bool) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"(APIServer pid={os.getpid()}) %(levelname)s:     %(message)s"))
    access_level = logging.INFO if access_log else logging.CRITICAL
    for name, level in (("uvicorn.error", logging.INFO), ("uvicorn.access", access_level)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)
