"""Fixtures of the simulated engine's tests: a folder that is two GPUs, a tiny model, foreign memory, and engines.

No engine outlives its test, and none leaves a segment or a socket folder behind, whether the test passes or not.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import DEADLINE_S, MIB, ROOT, TINY, Engine

Launch = Callable[..., Engine]
Ballast = Callable[[int], "BallastProcess"]


class BallastProcess:
    """A foreign process on the first GPU."""

    def __init__(self, gpu_dir: Path, count_bytes: int) -> None:
        command = [sys.executable, "-m", "orchestrator.engine.simulator.ballast"]
        self.process = subprocess.Popen(
            [*command, "--gpu", "GPU-sim-0", "--bytes", str(count_bytes)],
            cwd=ROOT,
            env={"SIM_GPU_DIR": str(gpu_dir)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == f"holding {count_bytes}"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.terminate()
        self.process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A short path: a unix socket's name has room for 107 characters, and pytest's own folders have long ones."""
    with tempfile.TemporaryDirectory(prefix="simtest-") as path:
        yield Path(path)


@pytest.fixture
def gpu_dir(tmp_path: Path) -> Path:
    return make_gpus(tmp_path / "gpu")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    path = folder / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture
def launch(folder: Path, gpu_dir: Path, model: Path) -> Iterator[Launch]:
    """`launch(*flags, model=…, **environment)`: starts an engine with room for 50 bundles of KV."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, model: Path | str = model, kv: str | None = "403M", **env: str) -> Engine:
            sized = ["--kv-cache-memory-bytes", kv] if kv else []
            engine = Engine(folder, gpu_dir, model, [*sized, "--max-model-len", "32k", *flags], env)
            stack.callback(engine.close)
            return engine

        yield start


@pytest.fixture
def ballast(gpu_dir: Path) -> Iterator[Ballast]:
    with contextlib.ExitStack() as stack:

        def start(count_bytes: int) -> BallastProcess:
            process = BallastProcess(gpu_dir, count_bytes)
            stack.callback(process.close)
            return process

        yield start


def make_gpus(path: Path) -> Path:
    path.mkdir()
    card = {"name": "Simulated", "total_bytes": 10240 * MIB, "base_bytes": 600 * MIB}
    (path / "gpus.json").write_text(json.dumps([card | {"uuid": f"GPU-sim-{i}"} for i in (0, 1)]))
    return path
