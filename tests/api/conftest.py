"""The tests of api/ run on the daemon's own event loop, uvloop; `folder` is short enough for unix sockets (107 bytes)."""

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from orchestrator.api.proxy import Proxy


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-api-") as path:
        yield Path(path)


@pytest.fixture(params=["direct", "by ASGI"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways that a request may take: each test of a file that uses this is run on both."""
    if request.param != "direct":
        monkeypatch.setattr(Proxy, "direct", lambda proxy, connection, body: None)
    return str(request.param)
