"""Real clients against the running daemon: one daemon, on simulated GPUs, for all of them; each file adds the models that it breaks.

An engine's step of 10 ms is what makes a stream last long enough to be left, held or broken.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anthropic
import openai
import pytest

from tests.e2e.running import DEADLINE_S, Daemon

MAX_BODY = 4 << 20


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True) as folder:
        made = Daemon(Path(folder), ORCH_REQUESTS__MAX_BODY=str(MAX_BODY))
        try:
            yield made.start()
        finally:
            made.close()


@pytest.fixture(scope="session")
def model(daemon: Daemon) -> str:
    name = daemon.name("m")
    daemon.add(name, "--env", "VLLM_ENABLE_RESPONSES_API_STORE=1")
    return name


@pytest.fixture(scope="session")
def base(daemon: Daemon) -> str:
    """Without /v1, as Anthropic's SDK wants it."""
    return daemon.url.removesuffix("/v1")


class Guarded(NamedTuple):
    """A daemon that asks for keys, with a model that `key` may not use."""

    url: str
    model: str
    key: str


@pytest.fixture(scope="session")
def guarded() -> Iterator[Guarded]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-", ignore_cleanup_errors=True) as folder:
        made = Daemon(Path(folder), ORCH_KEYS__REQUIRED="always")
        try:
            made.start()
            for name in ("its", "others"):
                made.add(made.name(name), "--no-start")
            created = made.ctl("keys", "create", "one", "--model", made.name("its"))
            assert created.returncode == 0, created.stderr
            yield Guarded(made.url, made.name("others"), created.stdout.strip())
        finally:
            made.close()


@pytest.fixture
def by_openai(daemon: Daemon) -> Iterator[openai.OpenAI]:
    """It does not try again by itself, so a test sees each answer."""
    with openai.OpenAI(base_url=daemon.url, api_key="sk-none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture
def by_anthropic(base: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=base, api_key="sk-none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client
