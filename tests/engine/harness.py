"""Starts simulated engines as a daemon would, and speaks to them: HTTP over a unix socket, the segment, signals.

Whatever a test does, `close` kills the whole session and removes the segment and the worker sockets of that launch.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.engine.simulator.gpu import read_cards, start_time

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
DEADLINE_S = 20.0

# Two layers of 8 KV heads: a bundle of 8 MiB, 1024 tokens (64 blocks) a page.
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 65536,
}
BUNDLE = 8 * MIB
TOKENS_PER_PAGE = 1024
CONTEXT, PROFILE = 512 * MIB, 2048 * MIB
WEIGHTS = (1000 * 1024 + 2 * (1024 * 128 * 32 + 3 * 1024 * 2048)) * 2


def eventually(probe: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `probe`; failing loudly at the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


def holds(probe: Callable[[], bool], seconds: float = 0.35) -> bool:
    """True when `probe` is true all that time: more than three polls of the segment by the engine."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not probe():
            return False
        time.sleep(0.02)
    return True


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.close()
            raise


class Reply:
    """An answer read whole."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Engine:
    """One launch. `ready` waits for /health; the rest is what a daemon does."""

    def __init__(self, folder: Path, gpu_dir: Path, model: Path | str, flags: list[str], env: dict[str, str]) -> None:
        self.ipc = f"simtest-{uuid.uuid4().hex[:12]}"
        self.segment_path = Path("/dev/shm") / self.ipc
        self.worker_folder = Path(f"/tmp/kvcached-tp-{self.ipc}-{uuid.uuid5(uuid.NAMESPACE_DNS, self.ipc).hex[:8]}")
        self.uds = folder / f"{self.ipc}.sock"
        self.log_path = folder / f"{self.ipc}.log"
        self._connections: list[http.client.HTTPConnection] = []
        command = [sys.executable, "-m", "orchestrator.engine.simulator", "--model", str(model), "--uds", str(self.uds)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--served-model-name", "tiny", "alias", *flags],
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "SIM_GPU_DIR": str(gpu_dir),
                    "SIM_LOAD_S": "0",
                    "ENABLE_KVCACHED": "true",
                    "KVCACHED_IPC_NAME": self.ipc,
                    "VLLM_SERVER_DEV_MODE": "1",
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    # The process

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ready(self) -> Engine:
        eventually(self._healthy, f"ready; log: {self.log}")
        return self

    def _healthy(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError):
            return self.get("/health").status == 200
        return False

    @property
    def core(self) -> int:
        """The pid of EngineCore: the other process of the session."""
        others = [pid for pid in self.session() if pid != self.process.pid]
        assert len(others) == 1, others
        return others[0]

    def session(self) -> list[int]:
        """Living processes of the launched session."""
        found: list[int] = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit() and start_time(int(entry.name)) is not None:
                with contextlib.suppress(OSError):
                    if os.getsid(int(entry.name)) == self.process.pid:
                        found.append(int(entry.name))
        return found

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def kill_session(self) -> None:
        for pid in self.session():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        eventually(lambda: not self.session(), "the session is gone")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.kill_session()
        self.segment_path.unlink(missing_ok=True)
        shutil.rmtree(self.worker_folder, ignore_errors=True)

    # HTTP

    def open(self, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> http.client.HTTPConnection:
        """Send a request and do not wait for its answer."""
        connection = _UnixConnection(self.uds)
        self._connections.append(connection)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request(method, path, data, {"content-type": "application/json"} | named)
        return connection

    def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        with contextlib.closing(self.open(path, body, **headers)) as connection:
            return Reply(connection.getresponse())

    def get(self, path: str) -> Reply:
        with contextlib.closing(self.open(path, method="GET")) as connection:
            return Reply(connection.getresponse())

    def start(self, tokens: int, max_tokens: int, *, stream: bool = False) -> http.client.HTTPConnection:
        """A completion with a prompt of so many tokens, its answer not awaited."""
        body = {"model": "tiny", "prompt": "x" * tokens, "max_tokens": max_tokens, "stream": stream}
        return self.open("/v1/completions", body)

    def complete(self, tokens: int = 1, max_tokens: int = 1) -> Reply:
        with contextlib.closing(self.start(tokens, max_tokens)) as connection:
            return Reply(connection.getresponse())

    def rpc(self, method: str, *args: str | int) -> Any:
        reply = self.post("/collective_rpc", {"method": method, "args": list(args)})
        assert reply.status == 200, reply.text
        (result,) = reply.json["results"]
        return result

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")

    def counts(self) -> tuple[int, int]:
        """Requests running and waiting."""
        return int(self.metric("num_requests_running")), int(self.metric("num_requests_waiting"))

    # Memory

    def segment(self) -> tuple[int, int, int]:
        with self._segment("rb", fcntl.LOCK_SH) as file:
            total, used, prealloc = struct.unpack("=qqq", os.pread(file, 24, 0))
        return total, used, prealloc

    def set_total(self, total_bytes: int) -> None:
        with self._segment("r+b", fcntl.LOCK_EX) as file:
            os.pwrite(file, struct.pack("=q", total_bytes), 0)

    @contextlib.contextmanager
    def _segment(self, mode: str, lock: int) -> Iterator[int]:
        with self.segment_path.open(mode) as file:
            fcntl.flock(file, lock)
            yield file.fileno()

    def poke_until(self, probe: Callable[[], bool], what: str) -> None:
        """1-token requests, each an allocation, until the engine has applied what its watcher has seen."""
        eventually(lambda: self.complete().status == 200 and probe(), what)


def used_bytes(gpu_dir: Path, index: int = 0) -> int:
    """What NVML would show: the base and all living holders."""
    card = read_cards(gpu_dir)[index]
    used = card.base_bytes
    folder = gpu_dir / "held" / card.uuid
    for entry in os.scandir(folder) if folder.exists() else ():
        pid, _, started = entry.name.partition(".")
        if start_time(int(pid)) == int(started):
            with contextlib.suppress(OSError):
                data = Path(entry.path).read_bytes()
                used += struct.unpack("=q", data)[0] if len(data) == 8 else 0
    return used
