"""The daemon that chaos and soak drive: a process that is killed, held, ended and started again, in folders and on a port that stay.

Its models bear a prefix of their own, so what its engines leave is found, and nothing else's. It is gone when the `with` ends.
"""

import asyncio
import contextlib
import glob
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.box import ROOT
from bench.chaos.http import Broken, call
from bench.demo import QWEN
from bench.folders import of_shape

# Two layers of 8 KV heads: a page bundle of 8 MiB, 1024 tokens.
TINY = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2048}
TINY |= {"vocab_size": 1000, "tie_word_embeddings": True, "max_position_embeddings": 8192}
LARGE = {**TINY, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 174_000}  # the same with 8 GiB of weights
UP_S, DOWN_S, RESTART_S = 60.0, 60.0, 0.5


class Daemon:
    """`tmpfs_mib`: the state folder is a file system of that size, where this user may mount one. `before`: Python that runs first."""

    def __init__(self, env: Mapping[str, str], before: str = "", tmpfs_mib: int = 0) -> None:
        self._env, self._before, self._tmpfs_mib = env, before, tmpfs_mib
        self.process: subprocess.Popen[bytes] | None = None
        self.up_since = 0.0
        self.downs: list[tuple[float, float]] = []  # when clients could not be served, or not for sure
        self._down_at: float | None = None
        self.refused: list[str] = []

    def __enter__(self) -> Self:
        self.prefix = f"z{secrets.token_hex(3)}"
        self.folder = Path(tempfile.mkdtemp(prefix="orch-", dir="/tmp"))  # short: unix socket paths are
        self.state, self.admin, self.config = self.folder / "state", self.folder / "r/admin.sock", self.folder / "config.yaml"
        self.logs, self.log, self.simgpu = self.folder / "logs", self.folder / "daemon.log", self.folder / "r/simgpu"
        self.state.mkdir()
        self.small_disk = bool(self._tmpfs_mib) and _mounted(self.state, self._tmpfs_mib)
        self.tiny, self.large = of_shape(self.folder / "tiny", QWEN | TINY), of_shape(self.folder / "large", QWEN | LARGE)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        if not self.config.exists():
            self.config.write_text("{}\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Whatever is left ends here; a run that ended in order has left nothing."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for _ in range(3):  # an engine may be forking
            for pid in self.engine_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for path in self.paths():
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
        if self.small_disk:
            subprocess.run(["umount", "--lazy", str(self.state)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the process ----------------------------------------------------------------------------------------------

    def launch(self) -> None:
        program = ["-c", f"{self._before}\nfrom orchestrator.daemon import main; main()"] if self._before else ["-m", "orchestrator.daemon"]
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ORCH_")},
            "PYTHONPATH": str(ROOT),
            "ORCH_DIRS__STATE": str(self.state),
            "ORCH_DIRS__RUNTIME": str(self.folder / "r"),
            "ORCH_DIRS__LOGS": str(self.logs),
            "ORCH_LISTEN__PORT": str(self.port),
            "ORCH_GPUS__SOURCE": "simulated",
            "ORCH_LOG__FORMAT": "text",
            **self._env,
        }
        with open(self.log, "ab") as log:
            command = [sys.executable, *program, "serve", "--config", str(self.config)]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def start(self) -> float:
        """Seconds until it answered. One that ends at once is started again, as systemd does it; `refused` has its last words each time.
        Raises RuntimeError where it does not come up."""
        began = time.monotonic()
        self.launch()
        while time.monotonic() < began + UP_S:
            if self.process is None or self.process.poll() is not None:
                self.refused.append(self.log.read_text()[-300:].strip().rpartition("\n")[2])
                await asyncio.sleep(RESTART_S)
                self.launch()
            with contextlib.suppress(Broken, TimeoutError, ValueError):
                await call(self.admin, "GET", "/api/v1/status", timeout_s=5)
                self.is_up()
                return time.monotonic() - began
            await asyncio.sleep(0.02)
        raise RuntimeError(f"the daemon did not come up:\n{self.log.read_text()[-4000:]}")

    def is_up(self) -> None:
        self.up_since = time.monotonic()
        if self._down_at is not None:
            self.downs.append((self._down_at, self.up_since))
        self._down_at = None

    def is_down(self) -> None:
        """From now on clients may find nobody."""
        self._down_at = self._down_at or time.monotonic()

    @property
    def up(self) -> bool:
        return self._down_at is None and self.process is not None and self.process.poll() is None

    @property
    def expected_down(self) -> bool:
        return self._down_at is not None

    def was_down(self, began: float, ended: float) -> bool:
        return (self._down_at is not None and self._down_at <= ended) or any(a <= ended and began <= b for a, b in self.downs)

    def kill(self) -> None:
        """As a crash does it: engines go on."""
        assert self.process is not None
        self.is_down()
        self.process.kill()
        self.process.wait()

    async def end(self) -> int:
        """Its exit status after SIGTERM. Raises TimeoutExpired."""
        assert self.process is not None
        self.is_down()
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, DOWN_S)

    # ---- what there is --------------------------------------------------------------------------------------------

    def engine_processes(self) -> list[int]:
        """Those of its engines and launch servers: their output, which each keeps to its end, goes to its logs."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/fd/1").startswith(f"{self.logs}/"):
                        found.append(int(entry))
        return found

    def paths(self) -> list[str]:
        """Segments, and folders of worker sockets."""
        return sorted(glob.glob(f"/dev/shm/orch-{self.prefix}*") + glob.glob(f"/tmp/kvcached-tp-orch-{self.prefix}*"))

    def cards(self) -> dict[str, int]:
        """Bytes that an empty card could give, by UUID."""
        with contextlib.suppress(OSError, ValueError):
            rows = json.loads((self.simgpu / "gpus.json").read_text())
            return {row["uuid"]: row["total_bytes"] - row["base_bytes"] for row in rows}
        return {}

    def held(self) -> dict[str, int]:
        """Bytes that living processes hold, by UUID of the card."""
        found: dict[str, int] = {}
        for path in (self.simgpu / "held").glob("*/*"):
            with contextlib.suppress(OSError, struct.error):
                if _started(int(path.name.partition(".")[0])) == path.name.partition(".")[2]:
                    found[path.parent.name] = found.get(path.parent.name, 0) + int(struct.unpack("=q", path.read_bytes())[0])
        return found

    def remains(self) -> dict[str, object]:
        """All that engines leave; empty when nothing does."""
        found: dict[str, object] = {
            "processes": [f"{pid} {_words(pid)}" for pid in self.engine_processes()],
            "segments and worker sockets": self.paths(),
            "socket folders": [path.name for path in (self.folder / "r/engines").glob("*")],
            "GPU bytes": sum(self.held().values()),
        }
        return {what: value for what, value in found.items() if value}

    # ---- talking --------------------------------------------------------------------------------------------------

    async def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """Raises Broken, TimeoutError, RuntimeError for a refusal."""
        status, body = await call(self.admin, "GET", f"/api/v1{path}", timeout_s=timeout_s)
        if status != 200:
            raise RuntimeError(f"GET {path}: {status} {body}")
        return body

    async def models(self) -> dict[str, Any]:
        return {model["name"]: model for model in (await self.get("/models"))["models"]}


def _mounted(folder: Path, size_mib: int) -> bool:
    if os.getuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "chaos", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _started(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def session(pid: int) -> int:
    """-1: it is gone."""
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return -1


def _words(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    return ""
