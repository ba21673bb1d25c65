"""sd_notify against real datagram sockets, a path and an abstract name; silent where systemd did not start us."""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.drivers.systemd import notify


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
