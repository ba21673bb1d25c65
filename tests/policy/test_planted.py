"""The table of planted bugs goes with the code. Planting them takes half an hour: `make planted`."""

import ast
from collections import Counter

import pytest

from tests.policy.planted_bugs import BUGS, Bug
from tests.policy.planted_run import ROOT, planted


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_and_is_python(bug: Bug) -> None:
    assert ast.dump(ast.parse(planted(bug, ROOT))) != ast.dump(ast.parse((ROOT / bug.file).read_text()))


def test_no_two_bugs_are_the_same() -> None:
    assert [name for name, count in Counter(bug.name for bug in BUGS).items() if count > 1] == []
    assert [text for text, count in Counter(planted(bug, ROOT) for bug in BUGS).items() if count > 1] == []
