"""Fixtures: `browser` and `daemon`, one for all of this folder's tests, which run on one worker; `page`, a tab in a fresh profile;
`fresh` as in e2e/. Without a Chromium the tests that need one are skipped, but in CI."""

import os
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Fresh, daemons
from tests.e2e.running import Daemon
from tests.ui.browser import CHROMIUM, Browser, Page
from tests.ui.tunnel import tunnel


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI must have a Chromium: .ci/run installs it"
        pytest.skip("no Chromium here: apt-get install chromium")
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.page() as found:
        yield found


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """With two models that are ready."""
    with daemons() as make:
        found = make(SIM_STEP_S="0.005").start()
        for name in ("one", "two"):
            found.add(found.name(name))
        yield found


@pytest.fixture(scope="session")
def url(daemon: Daemon) -> Iterator[str]:
    """The admin socket, as an operator's browser reaches it."""
    with tunnel(daemon.admin) as found:
        yield found


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    with daemons() as make:
        yield make
