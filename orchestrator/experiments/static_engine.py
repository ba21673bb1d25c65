"""The other arm: a plain vLLM with a static pool, of the same model, arguments and venv as the daemon's engine, without kvcached.

In its own session, on a unix socket in a private folder, kept by keeper.py: it ends with the `with`, and also where this process is
killed. On simulated GPUs it is the simulated engine, started the same way.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.drivers import processes
from orchestrator.drivers.processes import Process
from orchestrator.drivers.vllm import SIMULATOR, EngineVenv, venv_environment
from orchestrator.experiments import keeper
from orchestrator.experiments.answers import Endpoint, healthy
from orchestrator.experiments.asker import Asker
from orchestrator.experiments.trouble import Trouble
from orchestrator.policy.model import slug

ROOT = Path(__file__).parents[2]
SERVER = ("-m", "vllm.entrypoints.openai.api_server")
OURS = re.compile(r"KVCACHED_\w+|ENABLE_KVCACHED|VLLM_SERVER_DEV_MODE")  # what makes an engine the daemon's
SOCKET = "api.sock"
KEEPER_S = 20.0
GRACE_S = 5.0
GONE_S = 60.0
TAIL_LINES = 200
HIDDEN = "(hidden)"


@dataclass(frozen=True)
class Recipe:
    """What a static engine is started from. `pool_bytes`: its KV, where vLLM is not to find out by itself how much is left: it measures
    the card while it starts, and takes what another one takes meanwhile for its own."""

    model: str
    source: str
    venv: EngineVenv
    args: Sequence[str]
    env: Mapping[str, str]
    gpus: Sequence[str]
    tensor_parallel_size: int
    utilization: float
    pool_bytes: int | None = None


def check_python(venv: EngineVenv) -> None:
    """Raises Trouble where it has no Python to start an engine with."""
    if venv.kind == "vllm" and not os.access(venv.python, os.X_OK):
        raise Trouble(
            f"there is no Python to run at {venv.python}: name that of the engine venv with --engine-python,"
            " or `sudo make engine` builds one"
        )


def command(recipe: Recipe, uds: Path) -> list[str]:
    venv = recipe.venv
    program = [str(venv.python), *SERVER] if venv.kind == "vllm" else [sys.executable, "-m", SIMULATOR]
    return [
        *program,
        *("--model", recipe.source),
        *("--uds", str(uds)),
        *("--served-model-name", recipe.model),
        *("--tensor-parallel-size", str(recipe.tensor_parallel_size)),
        *("--gpu-memory-utilization", f"{recipe.utilization:g}"),
        *(["--kv-cache-memory-bytes", str(recipe.pool_bytes)] if recipe.pool_bytes is not None else []),
        *venv.args,
        *recipe.args,
    ]


def environment(recipe: Recipe, folder: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """As the daemon's engines have it, less kvcached."""
    env = {**venv_environment(recipe.venv, inherited), **recipe.env}
    kept = {name: value for name, value in env.items() if value != HIDDEN and not OURS.fullmatch(name)}
    secret = {name: inherited[name] for name, value in env.items() if value == HIDDEN and name in inherited}
    return kept | secret | {
        "KVCACHED_AUTOPATCH": "0",
        "VLLM_RPC_BASE_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": ",".join(recipe.gpus),
    }  # fmt: skip


class StaticEngine:
    """A context manager: what it started is gone when it is left, its memory too as far as its processes are. `log`: of the engine."""

    def __init__(self, recipe: Recipe, log: Path) -> None:
        self.recipe, self.log = recipe, log
        self.endpoint: Endpoint
        self._process: Process | None = None
        self._heard = b""
        self._ended: str | None = None

    def __enter__(self) -> Self:
        """Starts it, and returns before it is ready. Raises Trouble."""
        check_python(self.recipe.venv)
        name = slug(self.recipe.model)
        folder = Path(tempfile.mkdtemp(prefix=f"orch-bench-{name}-", dir="/tmp"))  # short: a unix socket's path has 107 bytes
        self.folder, self.endpoint = folder, Endpoint(socket=folder / SOCKET)
        self.log.write_bytes(b"")
        order = {
            "argv": command(self.recipe, folder / SOCKET),
            "env": environment(self.recipe, folder, os.environ),
            "log": str(self.log.absolute()),
            "folder": str(folder),
            "grace_s": GRACE_S,
        }
        self._channel, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-m", "orchestrator.experiments.keeper", str(theirs.fileno()), name]
            keeper_log = folder / "keeper.log"
            _, self._keeper = processes.spawn(argv, {**os.environ, "PYTHONPATH": str(ROOT)}, keeper_log, (theirs.fileno(),))
        try:
            self._channel.sendall(json.dumps(order).encode() + b"\n")
            self._until_started()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Returns when nothing of it runs. Raises Trouble where something does, all the same."""
        self._channel.close()
        with contextlib.suppress(TimeoutError):
            self._keeper.wait(GONE_S)
        if self._process is not None and processes.members(self._process):  # its keeper was killed
            keeper.end(self._process, None, 0.0)
            if processes.members(self._process):
                raise Trouble(f"the static engine of {self.recipe.model} does not end: see `ps -s {self.leader}`")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def leader(self) -> int:
        """Of its session; 0 before it was started."""
        return self._process.pid if self._process else 0

    def check(self) -> None:
        """Raises Trouble, with its log's telling line, where it has ended."""
        self._listen(0.0)
        if self._ended is not None:
            lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            raise Trouble(f"the static engine of {self.recipe.model} {self._ended}", [*telling(lines), f"its log: {self.log}"])

    def ready(self, asker: Asker) -> bool:
        self.check()
        return asker.run(healthy(self.endpoint))

    def _until_started(self) -> None:
        deadline = time.monotonic() + KEEPER_S
        while not self.leader and self._ended is None:
            if time.monotonic() > deadline:
                raise Trouble("the keeper of the static engine did not start in time: is the machine overloaded?")
            self._listen(0.1)
        if not self.leader:
            raise Trouble(f"the static engine of {self.recipe.model} can not be started: {self._ended}")

    def _listen(self, wait_s: float) -> None:
        """Heeds what the keeper has said."""
        self._channel.settimeout(wait_s)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            part = self._channel.recv(1 << 16)
            self._heard += part
            if not part:
                self._ended = self._ended or "lost its keeper"
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            said: dict[str, Any] = json.loads(line)
            if "pid" in said:
                self._process = Process(int(said["pid"]), float(said["create_time"]))
            self._ended = said.get("ended") or said.get("error") or self._ended


_TELLING = re.compile(r"(?:\w*(?:Error|Exception)|OutOfMemory\w*)\b: \S")
_SECOND_HAND = re.compile(r"Engine core initialization failed|EngineDeadError|EngineCore encountered|cancelled|KeyboardInterrupt")


def telling(lines: Sequence[str]) -> list[str]:
    """The line of a log that says why: the last error that is not about another error; else the last line there is."""
    errors = [line for line in lines if _TELLING.search(line) and not _SECOND_HAND.search(line)]
    found = errors or [line for line in lines if line.strip()]
    return [found[-1].strip()[:500]] if found else []
