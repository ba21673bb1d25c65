"""The table of planted bugs goes with the code, and what a run of it left behind goes with the table and with the tests.

Planting them takes half an hour: `make planted`, which also writes the page and the results anew.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.results import RESULTS
from tests.policy.planted_bugs import BUGS, Bug
from tests.policy.planted_page import PAGE, in_words
from tests.policy.planted_run import ROOT, planted

RESULT = RESULTS / "planted-bugs.json"


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_and_is_python(bug: Bug) -> None:
    assert ast.dump(ast.parse(planted(bug, ROOT))) != ast.dump(ast.parse((ROOT / bug.file).read_text()))


def test_no_two_bugs_are_the_same() -> None:
    assert [name for name, count in Counter(bug.name for bug in BUGS).items() if count > 1] == []
    assert [text for text, count in Counter(planted(bug, ROOT) for bug in BUGS).items() if count > 1] == []


def test_the_page_and_the_results_are_of_these_bugs_and_none_survived() -> None:
    result = json.loads(RESULT.read_text())
    assert [row[:2] for row in rows("| bug |")] == [[bug.name, bug.harm] for bug in BUGS]
    assert list(result["notes"]) == [bug.name for bug in BUGS]
    assert (result["figures"]["bugs"], result["figures"]["bugs_survived"]) == (len(BUGS), 0)
    for bug, row in zip(BUGS, rows("| bug |"), strict=True):
        seen = result["notes"][bug.name]
        assert seen["choice"] == bug.choice
        assert seen["property"] or seen["simulation"] or (bug.choice and seen["example"]), f"{bug.name}: no test caught it"
        assert row[2] == (in_words([*seen["property"], *seen["simulation"]]) or f"a choice: {bug.choice}")
        assert row[3] == (in_words(seen["example"]) or "-")


def test_every_property_of_the_page_is_still_there() -> None:
    """And every test that caught something: who renames or removes one runs `make planted` once more."""
    there = {f"{path.name}::{name}" for path in (ROOT / "tests/policy").glob("test_*.py") for name in names_in(path)}
    properties = {row[0].strip("`") for row in rows("| property |")}
    seen = json.loads(RESULT.read_text())["notes"].values()
    caught = {test for bug in seen for kind in ("property", "simulation", "example") for test in bug[kind]}
    assert properties
    assert {name for name in properties | caught if name.removesuffix("::runTest") not in there} == set()


def rows(head: str) -> list[list[str]]:
    """Of the page's table with that head: the cells of each line below it."""
    _, _, below = (ROOT / PAGE).read_text().partition(f"\n{head}")
    lines = below.splitlines()[2:]  # the rest of the head, and the rule under it
    ends = next((at for at, line in enumerate(lines) if not line.startswith("| ")), len(lines))
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[:ends]]


def names_in(path: Path) -> Iterator[str]:
    """What it defines: tests are functions, but for the simulation, which hypothesis makes a class of."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
