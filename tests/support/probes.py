"""Launch servers whose engines are probes: each says what it finds, then ends as it is told. Nothing of them outlives `close`."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil

from orchestrator.drivers import processes, vllm
from orchestrator.drivers.launch_server import LaunchServers
from orchestrator.drivers.processes import Child, Process
from orchestrator.drivers.vllm import EngineVenv
from tests.support.eventually import DEADLINE_S, eventually

PROBE = textwrap.dedent(
    """
    import ctypes, json, os, pathlib, random, signal, sys
    VERSION = "probe"
    os.environ["SET_BY_AN_IMPORT"] = "1"
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p

    def main():
        found = {
            "argv": sys.argv, "environ": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid(), "sid": os.getsid(0),
            "c_ipc_name": str(getenv(b"KVCACHED_IPC_NAME")), "c_leak": str(getenv(b"SIM_LEAK")), "random": random.random(),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")},
        }
        print(json.dumps(found), flush=True)
        if sys.argv[1] == "wait":
            signal.pause()
        return int(sys.argv[1])
    """
)


class Bench:
    """A venv whose engines are probes, the launch servers of it, and every engine that was forked."""

    def __init__(self, root: Path) -> None:
        processes.adopt_orphans()
        self.root = root
        self.package = root / "site/orchestrator/engine/simulator"
        self.package.mkdir(parents=True)
        for folder in (self.package, *list(self.package.parents)[:2]):
            (folder / "__init__.py").touch()
        (self.package / "serving.py").touch()
        self.probe(PROBE)
        python = root / "venv/bin/python"
        self.kvcached = root / "venv/lib/python3/site-packages/kvcached-0.1.6.dist-info"
        for folder in (python.parent, self.kvcached):
            folder.mkdir(parents=True)
        python.symlink_to(sys.executable)
        self.venvs = {"default": EngineVenv("simulated", python, env={"PYTHONPATH": str(root / "site")}, launch_server=True)}
        self.servers = LaunchServers(self.venvs, root)
        self.engines: list[tuple[Process, Child | None]] = []
        self._launches = 0

    def probe(self, source: str) -> None:
        (self.package / "__main__.py").write_text(source)

    @property
    def venv(self) -> EngineVenv:
        return self.venvs["default"]

    def log(self) -> Path:
        self._launches += 1
        return self.root / f"engine.{self._launches}.log"

    def env(self, **more: str) -> dict[str, str]:
        return vllm.venv_environment(self.venv, os.environ) | {"KVCACHED_IPC_NAME": "orch-probe", "CUDA_VISIBLE_DEVICES": "GPU-7"} | more

    async def fork(self, word: str = "wait", log: Path | None = None, **env: str) -> tuple[Process, Child]:
        argv = [sys.executable, "-m", "orchestrator.engine.simulator", word, "--uds", str(self.root / "api.sock")]
        process, child = await self.servers.fork("default", argv, self.env(**env), log or self.log())
        self.engines.append((process, child))
        assert child is not None
        return process, child

    async def status(self) -> dict[str, Any]:
        return (await self.servers.status())["default"]

    async def server(self, but: int | None = None) -> int:
        """The pid of one that is ready, and not `but`."""
        self.servers.warm(["default"])
        async with asyncio.timeout(DEADLINE_S):
            while (found := await self.status())["state"] != "ready" or found["pid"] == but:  # each look is a thread's turn
                pass
        return int(found["pid"])

    def forks(self) -> list[int]:
        """Living processes that were forked and not ended: the sessions with an engine's log for their output."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/1").startswith(str(self.root / "engine.")):
                    found.append(pid)
        return found

    async def close(self) -> None:
        await self.servers.close()
        for pid in self.forks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _, child in self.engines:
            if child is not None:
                child.wait()
        await eventually(lambda: not self.forks(), "nothing runs on")
        processes.adopt_orphans(False)
        processes.reap()


async def said(log: Path) -> dict[str, Any]:
    """What a probe found."""
    text = await eventually(lambda: log.exists() and log.read_text().endswith("}\n") and log.read_text(), f"{log.name} is written")
    found: dict[str, Any] = json.loads(str(text))
    return found


def zombies(session: int) -> list[int]:
    return [
        child.pid for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE and os.getsid(child.pid) == session
    ]
