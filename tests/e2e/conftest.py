"""Fixtures: `daemon`, one for a whole file; `fresh`, makes daemons for one test. Nothing of either outlives it, passed or failed.

The folder is short: a unix socket's name has 107 bytes, of which a runtime folder may take 53.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.running import DEADLINE_S, Daemon

Fresh = Callable[..., Daemon]
Client = Callable[[Daemon], openai.OpenAI]


@contextlib.contextmanager
def daemons() -> Iterator[Fresh]:
    with contextlib.ExitStack() as stack:

        def make(before: str = "", **env: str) -> Daemon:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True)))
            daemon = Daemon(folder, before, **env)
            stack.callback(daemon.close)
            return daemon

        yield make


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with daemons() as make:
        yield make().start()


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    with daemons() as make:
        yield make


@pytest.fixture
def client() -> Iterator[Client]:
    """The official client; it does not try again by itself, so a test sees each answer."""
    with contextlib.ExitStack() as stack:

        def made(daemon: Daemon) -> openai.OpenAI:
            return stack.enter_context(openai.OpenAI(base_url=daemon.url, api_key="none", max_retries=0, timeout=DEADLINE_S))

        yield made
