"""The clients of older.txt: openai 2.x by the tests of the newest, and LiteLLM, which has not come as far."""

from collections.abc import Mapping

import pytest

from tests.clients import matrix, older

pytestmark = [pytest.mark.xdist_group("older clients"), pytest.mark.timeout(older.INSTALL_S + older.RUN_S)]


@pytest.fixture(scope="module")
def outcomes() -> Mapping[str, str]:
    return older.outcomes(matrix.OLDER)


@pytest.mark.parametrize("test", [f"{file}::{test}" for file in matrix.OLDER for test in matrix.tests_of(file)])
def test_as_the_newest(outcomes: Mapping[str, str], test: str) -> None:
    assert outcomes[test] == ""
