"""A daemon of its own: its folders are temporary, its port is free, and it is gone when the `with` ends.

Driven as a person would: orchestratord as a process, orchestratorctl as a command; looked at through the admin API.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.cli.client import Client, model_path
from orchestrator.cli.exits import CliError
from orchestrator.cli.target import Target

ROOT = Path(__file__).parents[1]
SIMULATED_CARD = {"ORCH_GPUS__SOURCE": "simulated", "ORCH_GPUS__SIMULATED": json.dumps({"count": 1, "memory": "140GiB"})}
START_S, STOP_S, CTL_S = 30.0, 60.0, 300.0
SAMPLE_S = 0.2


@dataclass(frozen=True)
class Sample:
    """One look at everything: seconds since the box was there, the status object, the models by name."""

    at_s: float
    status: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]


@dataclass
class Box:
    """`env`: more ORCH_ settings. `configs`: config files. `log`: where the daemon's own log goes (a copy that is kept).

    `sampled`: look at it five times a second from the start; off where the daemon's own work is what is measured.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    configs: Sequence[Path] = ()
    log: Path | None = None
    sampled: bool = True

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="orch-", dir="/tmp"))  # short: unix socket paths are
        self.socket = self.folder / "run/admin.sock"
        self._log = open(self.log or self.folder / "daemon.log", "wb")
        self._samples: list[Sample] = []
        self._paused = False
        self._stop = threading.Event()
        self._environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "ORCH_DIRS__STATE": str(self.folder / "state"),
            "ORCH_DIRS__RUNTIME": str(self.folder / "run"),
            "ORCH_LISTEN__PORT": "0",
            **self.env,
        }
        options = [word for path in self.configs for word in ("--config", str(path))]
        self._command = [sys.executable, "-m", "orchestrator.daemon", "serve", *options]
        self.begin()
        try:
            self._until_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._began = time.monotonic()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if self.sampled:
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Start the daemon: also anew, after kill()."""
        self.process = subprocess.Popen(self._command, cwd=ROOT, env=self._environ, stdout=self._log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """As the kernel does it: nothing is ended in order."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def url(self) -> str:
        return str(self.status()["listen"]) + "/v1"

    def ctl(self, *words: str, check: bool = True, timeout_s: float = CTL_S) -> subprocess.CompletedProcess[str]:
        """orchestratorctl as a command. Raises RuntimeError with its words if it fails, TimeoutExpired if it takes too long."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "--host", str(self.socket), *words],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"orchestratorctl {' '.join(words)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def status(self) -> Mapping[str, Any]:
        return self._client().get("/status")

    def models(self) -> dict[str, Mapping[str, Any]]:
        return {model["name"]: model for model in self._client().models()["models"]}

    def limit(self, name: str, **bounds: int | None) -> None:
        """New bounds (kv_ceiling=…) for a model that runs; None: back to its spec. Returns when they are taken, not when in force."""
        self._client().send("POST", model_path(name, "/limit"), bounds)

    def events(self) -> list[Mapping[str, Any]]:
        """The newest 1000 things that happened, as the daemon tells them."""
        return list(self._client().get("/events?tail=1000")["events"])

    def logs(self) -> Path:
        """The folder of the engines' logs; gone with the box."""
        return self.folder / "state/logs"

    def until_ready(self, names: Sequence[str], timeout_s: float) -> None:
        """Raises RuntimeError with what is not ready by then, and why."""
        deadline = time.monotonic() + timeout_s
        while True:
            models = self.models()
            late = {name: models.get(name, {}) for name in names if models.get(name, {}).get("state") != "ready"}
            if not late:
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                why = "; ".join(f"{name}: {model.get('state')}: {model.get('reason')}" for name, model in late.items())
                raise RuntimeError(f"not ready after {timeout_s:.0f}s: {why}")
            time.sleep(0.3)

    def samples(self) -> list[Sample]:
        return list(self._samples)

    def now_s(self) -> float:
        return time.monotonic() - self._began

    def _client(self) -> Client:
        return Client(Target(str(self.socket), socket=str(self.socket)))

    def _until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(CliError):
                self.status()
                return
            time.sleep(0.05)
        self._log.flush()
        raise RuntimeError(f"the daemon did not come up:\n{Path(self._log.name).read_text()[-4000:]}")

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Not sampled meanwhile: where the daemon's own speed is what is measured."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            if self._paused:
                continue
            with contextlib.suppress(CliError, KeyError, json.JSONDecodeError):
                self._samples.append(Sample(self.now_s(), self.status(), self.models()))
