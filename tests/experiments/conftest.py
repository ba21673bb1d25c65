"""Fixtures: `daemon`, one for a file, on a simulated GPU; `bench`, runs `orchestratorctl bench` against it as a process."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import daemons
from tests.e2e.running import DEADLINE_S, Daemon

SHORT = ("--requests", "2", "--tokens", "8", "--pause", "0", "--settle", "0.2s", "--yes")
KEEPER = "orchestrator.experiments.keeper"
Bench = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with daemons() as make:
        found = make().start()
        found.add(found.name("a"))
        yield found


@pytest.fixture
def bench(daemon: Daemon, tmp_path: Path) -> Iterator[Bench]:
    """Starts it; its results are in tmp_path/out. What is still running when the test ends is killed."""
    with contextlib.ExitStack() as held:

        def start(*words: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
            argv = [sys.executable, "-m", "orchestrator.cli", "bench", *words, "--out", str(tmp_path / "out")]
            environ = {**daemon.env, "ORCH_HOST": str(daemon.admin), **(env or {})}
            process = held.enter_context(
                subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            held.callback(process.kill)
            return process

        yield start


def heard(process: "subprocess.Popen[str]", wanted: str) -> str:
    """Its stderr until there is a line with `wanted`."""
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if wanted in line:
            return told
    raise AssertionError(f"ended without {wanted!r}: {told}")


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, stdout, the rest of stderr."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def static_processes(daemon: Daemon) -> list[psutil.Process]:
    """Living processes of static engines of this daemon's models, and their keepers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            ours = any(word.startswith((daemon.prefix, f"/tmp/orch-bench-{daemon.prefix}")) for word in words)
            apart = any(word.startswith("/tmp/orch-bench-") or word == KEEPER for word in words)
            if ours and apart and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def static_folders(daemon: Daemon) -> list[Path]:
    return [*Path("/tmp").glob(f"orch-bench-{daemon.prefix}*")]
