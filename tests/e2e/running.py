"""The daemon, its engines and orchestratorctl as real processes, and what is left of them: processes, segments, folders, GPU bytes.

Every model of one Daemon bears a prefix of its own, so that cleaning up finds all that this daemon's engines made, and nothing else's.
"""

import contextlib
import glob
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

import orchestrator

ROOT = str(Path(orchestrator.__file__).parent.parent)
DEADLINE_S = 40.0
T = TypeVar("T")

# Two layers of 8 KV heads: a page bundle of 8 MiB, 1024 tokens.
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
# The same with 8 GiB of weights: of such, two fit a card of 24 GiB, and sleep gives most of one back.
LARGE = {**TINY, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 174_000}


def eventually(probe: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `probe`; a failure at the deadline."""
    end = time.monotonic() + deadline_s
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.02)
    return value


class _Unix(http.client.HTTPConnection):
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


class Daemon:
    """`orchestratord serve` on simulated GPUs, in a folder of its own. `before`: Python that its process runs first."""

    def __init__(self, folder: Path, before: str = "", **env: str) -> None:
        self.folder = folder
        self._program = ["-c", f"{before}\nfrom orchestrator.daemon import main; main()"] if before else ["-m", "orchestrator.daemon"]
        self.prefix = f"e{secrets.token_hex(3)}"
        self.model_folder = folder / "tiny"
        self.large_folder = folder / "large"
        for path, shape in ((self.model_folder, TINY), (self.large_folder, LARGE)):
            path.mkdir()
            (path / "config.json").write_text(json.dumps(shape))
        self.log = folder / "daemon.log"
        self.admin = folder / "r/admin.sock"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": ROOT,
            "ORCH_DIRS__STATE": str(folder / "s"),
            "ORCH_DIRS__RUNTIME": str(folder / "r"),
            "ORCH_GPUS__SOURCE": "simulated",
            "ORCH_LISTEN__PORT": "0",
            "ORCH_LOG__FORMAT": "text",
            "SIM_LOAD_S": "0",
            **env,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def name(self, model: str) -> str:
        return f"{self.prefix}-{model}"

    # ---- the process ----------------------------------------------------------------------------------------------

    def start(self) -> "Daemon":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._program, "serve"], env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stderr=log
            )

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return bool(self.get("/status"))
            return False

        eventually(answers, f"the daemon answers; {self.log.read_text()}")
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash does it: engines go on."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for _ in range(3):  # an engine may be forking
            for process in self.engine_processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(DEADLINE_S)
        for path in self.segments():
            path.unlink(missing_ok=True)
        for path in self.worker_folders():
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def engines_held(self) -> Iterator[None]:
        """Engines stand still meanwhile: a request that runs does not end before the test has seen what it wants to see."""
        held = self.engine_processes()
        for process in held:
            process.suspend()
        try:
            yield
        finally:
            for process in held:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    # ---- what there is --------------------------------------------------------------------------------------------

    def engine_processes(self) -> list[psutil.Process]:
        """Every living process that was launched as an engine of this daemon; a fork bears its parent's words."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if any(word.startswith(f"{self.folder}/r/engines/") for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def segments(self) -> list[Path]:
        return [Path(path) for path in glob.glob(f"/dev/shm/orch-{self.prefix}*")]

    def worker_folders(self) -> list[Path]:
        return [Path(path) for path in glob.glob(f"/tmp/kvcached-tp-orch-{self.prefix}*")]

    def held_bytes(self) -> int:
        """What simulated engines that live hold of all GPUs."""
        held = 0
        for path in (self.folder / "r/simgpu/held").glob("*/*"):
            with contextlib.suppress(OSError, struct.error):
                if psutil.pid_exists(int(path.name.partition(".")[0])):
                    held += struct.unpack("=q", path.read_bytes())[0]
        return held

    def remains(self) -> dict[str, object]:
        """All that engines leave; empty when nothing does."""
        found: dict[str, object] = {
            "processes": [process.pid for process in self.engine_processes()],
            "segments": self.segments(),
            "worker folders": self.worker_folders(),
            "socket folders": list((self.folder / "r/engines").iterdir()),
            "GPU bytes": self.held_bytes(),
        }
        return {what: value for what, value in found.items() if value}

    # ---- talking --------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return self._good("GET", path)

    def post(self, path: str, given: Any) -> Any:
        return self._good("POST", path, given)

    def tell(self, name: str, verb: str) -> None:
        """load, sleep, … that must be taken."""
        self._good("POST", f"/models/{name}/{verb}")

    def refusal(self, method: str, path: str, given: Any = None) -> tuple[int, Any]:
        """Status and error of a call that must be refused."""
        status, body = self._call(method, path, given)
        assert status >= 400, body
        return status, body["error"]

    def _good(self, method: str, path: str, given: Any = None) -> Any:
        status, body = self._call(method, path, given)
        assert status in (200, 201, 202), body
        return body

    def _call(self, method: str, path: str, given: Any = None) -> tuple[int, Any]:
        with contextlib.closing(_Unix(self.admin)) as connection:
            connection.request(method, f"/api/v1{path}", None if given is None else json.dumps(given))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def model(self, name: str) -> Any:
        return self.get(f"/models/{name}")

    def until_state(self, name: str, *states: str) -> Any:
        def there() -> Any:
            model = self.model(name)
            return model if model["state"] in states else None

        return eventually(there, f"{name} is {' or '.join(states)}; {self.log.read_text()}")

    @property
    def url(self) -> str:
        return f"{self.get('/status')['listen']}/v1"

    def ctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return run_ctl(*words, env={**self.env, "ORCH_HOST": str(self.admin)})

    def add(self, name: str, *words: str) -> Any:
        """add-model that must succeed; the model as it is then."""
        done = self.ctl("add-model", name, str(self.model_folder), "--timeout", f"{DEADLINE_S:.0f}s", "--json", *words)
        assert done.returncode == 0, (done.stderr, self.log.read_text())
        return json.loads(done.stdout)


def run_ctl(*words: str, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    return subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=DEADLINE_S + 20, check=False)
