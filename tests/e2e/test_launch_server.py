"""Engines of a whole daemon are forked from a launch server, which never outlives it, however it ends."""

import os
import signal

import psutil

from tests.e2e.conftest import Fresh
from tests.e2e.running import Daemon, eventually


def server(daemon: Daemon) -> int:
    """The pid of the launch server, once there is one that has forked."""
    return int(eventually(lambda: daemon.get("/status")["launch_servers"]["default"]["pid"], "a launch server"))


def test_engines_are_forked_and_status_says_so(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"))
    daemon.add(daemon.name("b"))
    shown = daemon.get("/status")["launch_servers"]["default"]
    assert (shown["state"], shown["forks"], shown["threads"]) == ("ready", 2, 1)
    said = daemon.ctl("status").stdout
    assert f"default: ready, pid {shown['pid']}" in said
    assert "2 engines forked" in said
    engine = psutil.Process(daemon.model(daemon.name("a"))["engine"]["pid"])
    assert daemon.process is not None
    assert engine.ppid() == daemon.process.pid  # who alone learns how it ends
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not psutil.pid_exists(shown["pid"])
    assert daemon.remains() == {}


def test_it_ends_with_a_killed_daemon_and_engines_are_adopted(fresh: Fresh) -> None:
    daemon = fresh().start()
    name = daemon.name("a")
    daemon.add(name)
    first, engine = server(daemon), daemon.model(name)["engine"]["pid"]
    daemon.kill()
    eventually(lambda: not psutil.pid_exists(first), "its launch server has ended")
    daemon.start()
    daemon.until_state(name, "ready")
    assert daemon.model(name)["engine"]["pid"] == engine
    assert server(daemon) != first  # there before it is needed: a model names its venv
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert daemon.remains() == {}


def test_dead_engines_leave_no_zombies(fresh: Fresh) -> None:
    daemon = fresh().start()
    name = daemon.name("a")
    daemon.add(name)
    for process in daemon.engine_processes():
        os.kill(process.pid, signal.SIGKILL)
    daemon.until_state(name, "backoff", "starting", "stopped", "waiting", "stopping")
    assert daemon.process is not None
    ours = psutil.Process(daemon.process.pid)

    def zombies() -> list[int]:
        return [child.pid for child in ours.children() if child.status() == psutil.STATUS_ZOMBIE]

    eventually(lambda: not zombies(), "they are buried")


def test_without_it_engines_are_executed(fresh: Fresh) -> None:
    daemon = fresh(ORCH_ENGINES='{"default": {"launch_server": false}}').start()
    daemon.add(daemon.name("a"))
    assert daemon.get("/status")["launch_servers"] == {}
    assert "Launch servers" not in daemon.ctl("status").stdout
