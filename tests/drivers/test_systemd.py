"""sd_notify against real datagram sockets, a path and an abstract name; silent where systemd did not start us."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.drivers.systemd import handed_socket, notify, reloading


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@orch-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_each_message_arrives_whole(manager: socket.socket) -> None:
    for message in ("READY=1", "WATCHDOG=1\nSTATUS=3 models ready – gut"):
        assert notify(message)
        assert manager.recv(4096).decode() == message


@pytest.mark.parametrize("value", [None, "", "relative", "vsock:2:1234", "/nowhere/notify", "@orch-test-nobody"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify("READY=1")


def test_a_manager_that_went_and_came_back_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
            sock.settimeout(10)
            assert notify("WATCHDOG=1")
            assert sock.recv(4096) == b"WATCHDOG=1"
        assert not notify("WATCHDOG=1")
        path.unlink()


def test_a_reload_says_when_it_began(manager: socket.socket) -> None:
    before = time.monotonic_ns() // 1000
    assert reloading("reading")
    first, at, status = manager.recv(4096).decode().split("\n")
    assert (first, status) == ("RELOADING=1", "STATUS=reading")
    assert before <= int(at.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


HANDS_OVER = """
import os, socket, sys
from orchestrator.drivers import systemd
if len(sys.argv) == 1:
    sock = socket.create_server(("127.0.0.1", 0))
    systemd.hand_over(sock)
    print(sock.getsockname()[1], flush=True)
    os.execv(sys.executable, [sys.executable, "-c", os.environ["PROGRAM"], "again"])
sock = systemd.handed_socket()
print(sock.getsockname()[1], sock.get_inheritable(), "LISTEN_FDS" in os.environ, systemd.handed_socket(), flush=True)
sock.accept()[0].sendall(b"here")
"""


def test_a_listening_socket_outlives_the_program_and_is_nobody_elses() -> None:
    env = {**os.environ, "PROGRAM": HANDS_OVER, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", HANDS_OVER], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=10) as early:  # before or after the exec: it is answered
            assert early.recv(4) == b"here"
        assert process.stdout.readline().split() == [str(port), "False", "False", "None"]


@pytest.mark.parametrize(("fds", "pid"), [("1", "1"), ("0", None), ("x", None), ("", None)])
def test_a_socket_that_was_not_handed_to_us_is_left_alone(monkeypatch: pytest.MonkeyPatch, fds: str, pid: str | None) -> None:
    monkeypatch.setenv("LISTEN_FDS", fds)
    monkeypatch.setenv("LISTEN_PID", pid or str(os.getpid()))
    assert handed_socket() is None
    assert "LISTEN_FDS" not in os.environ
