"""Fixtures: `daemon` (a stub on a unix socket), `sock` (its path), `ctl` (the CLI in this process).

The socket lies in a short folder of its own: a unix socket's path holds 107 bytes, which pytest's tmp_path may pass.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli.main import cli

from .stub_daemon import Handler, StubDaemon, TcpServer, UnixServer

Ctl = Callable[..., Result]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORCH_HOST", "ORCH_ADMIN_KEY", "XDG_RUNTIME_DIR", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sock() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="orch-cli-") as folder:
        yield os.fspath(Path(folder) / "admin.sock")


@pytest.fixture
def daemon(sock: str) -> Iterator[StubDaemon]:
    stub = StubDaemon(UnixServer(sock, Handler))
    yield stub
    stub.close()


@pytest.fixture
def tcp_daemon() -> Iterator[tuple[StubDaemon, str]]:
    server = TcpServer(("127.0.0.1", 0), Handler)
    stub = StubDaemon(server)
    yield stub, f"http://127.0.0.1:{server.server_address[1]}"
    stub.close()


@pytest.fixture
def ctl(sock: str) -> Ctl:
    """Runs the CLI in this process against the stub; what it raises beside an exit fails the test."""

    def call(*words: str, **env: str) -> Result:
        return CliRunner(catch_exceptions=False).invoke(cli, list(words), env={"ORCH_HOST": sock, **env})

    return call
