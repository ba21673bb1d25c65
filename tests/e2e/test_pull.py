"""`pull` through the daemon: one download for all who ask, ended with the last of them, and gone on with by the next."""

import json
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.running import COMMAND, run
from tests.e2e.conftest import daemons
from tests.e2e.running import Daemon, eventually
from tests.support.hub import Hub

MIB = 1 << 20
LARGE, SMALL = random.Random(3).randbytes(24 * MIB), random.Random(4).randbytes(MIB)
FILES = {"config.json": b"{}", "model.safetensors": LARGE, "more.safetensors": SMALL}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(FILES) as made:
        yield made


@pytest.fixture(scope="module")
def daemon(hub: Hub) -> Iterator[Daemon]:
    with daemons() as make:
        yield make(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1").start()


def environment(daemon: Daemon) -> dict[str, str]:
    return {**daemon.env, "ORCH_HOST": str(daemon.admin)}


def begin(daemon: Daemon, *words: str) -> "subprocess.Popen[str]":
    command = [*COMMAND, "pull", *words]
    return subprocess.Popen(command, env=environment(daemon), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def downloads(daemon: Daemon) -> list[psutil.Process]:
    assert daemon.process is not None
    return [child for child in psutil.Process(daemon.process.pid).children() if any("engine/pull.py" in word for word in child.cmdline())]


def loaded(daemon: Daemon) -> int:
    return sum(path.stat().st_size for path in Path(daemon.folder).rglob("*.incomplete"))


def test_all_who_ask_share_one_download_which_ends_with_the_last_of_them_and_is_gone_on_with(daemon: Daemon, hub: Hub) -> None:
    hub.hold = 12 * MIB  # the library writes 10 MiB at a time
    first, second = begin(daemon, "org/tiny"), begin(daemon, "org/tiny")
    assert hub.held.wait(40)
    eventually(lambda: loaded(daemon) >= 10 * MIB, "some of it is on the disk")
    assert len(downloads(daemon)) == 1
    assert second.stderr is not None
    assert "org/tiny: 3 files" in second.stderr.readline()  # it is attached
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=40)
    assert (first.returncode, "ended; what is loaded is kept, `orchestratorctl pull org/tiny` goes on" in said) == (130, True)
    assert len(downloads(daemon)) == 1
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=40)
    eventually(lambda: not downloads(daemon), "nobody follows: it is ended")
    kept = loaded(daemon)
    assert kept >= 10 * MIB
    hub.hold = None
    hub.go.set()
    done = run("pull", "org/tiny", env=environment(daemon))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("org/tiny is loaded: 14MiB", "org/tiny is loaded: 15MiB"))
    assert (daemon.folder / ".cache/huggingface/hub/models--org--tiny/refs/main").exists()
    assert "was complete already" in run("pull", "org/tiny", env=environment(daemon)).stdout


def test_a_registered_model_is_loaded_with_its_own_environment(daemon: Daemon, hub: Hub) -> None:
    name, home = daemon.name("m"), daemon.folder / "elsewhere"
    run("add-model", name, "org/tiny", "--env", f"HF_HOME={home}", "--no-start", env=environment(daemon))
    done = run("pull", name, "--json", env=environment(daemon))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (lines[0]["phase"], lines[0]["path"], lines[-1]["phase"]) == ("asked", f"{home}/hub", "done")


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("/models/tiny", 78, "a folder needs no pull"),
        ("org/a/b", 78, "is not a hub id"),
        ("--revision=x y", 2, "source"),
        ("org/none", 1, "org/none is not on http://127.0.0.1"),
    ],
)
def test_what_can_not_be_loaded_is_one_line(daemon: Daemon, source: str, code: int, said: str) -> None:
    done = run("pull", source, env=environment(daemon))
    assert done.returncode == code, done.stderr
    assert said.lower() in done.stderr.lower()


def test_an_engine_that_is_not_there_is_said(daemon: Daemon) -> None:
    assert "There is no engine 'none'; known: default" in run("pull", "org/tiny", "--engine", "none", env=environment(daemon)).stderr
