"""One run of the allocator's tests in a copy of the repository, with or without a planted bug.

The rule that keeps it right: the work tree is only read, and the copy stands first on the path of a process of its own, so that
what is tested is what was planted. `python -m tests.policy.planted_run OUT TESTS`, in the copy, is that process.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from tests.policy.planted_bugs import DECIDE, Bug

ROOT = Path(__file__).parents[2]
ALLOCATOR = ("test_division.py", "test_budgets*.py")
DECISIONS = ("test_decide*.py", "test_bad_input.py", "test_upkeep.py", "test_explain.py")
TESTS = (*ALLOCATOR, *DECISIONS)
SIMULATION = "test_budgets_simulation.py"
LIMIT_S = 900.0  # a run takes 25 s; a planted bug may be an endless loop, which pytest-timeout ends after 2 minutes
MISTAKES = ("NameError", "UnboundLocalError", "AttributeError", "SyntaxError")  # a bug that fails so was planted wrongly


class Misplanted(Exception):
    """The table and the code do not go together."""


@dataclass(frozen=True)
class Seen:
    """One test function. kind: property, simulation or example. `examples`: how many cases a property was tried on."""

    test: str
    kind: str
    failed: bool
    raised: tuple[str, ...] = ()
    examples: int | None = None


def planted(bug: Bug, root: Path) -> str:
    """The file with the bug in it. Raises Misplanted where the text to change is not there exactly once."""
    text = (root / bug.file).read_text()
    for before, after in ((bug.before, bug.after), *([bug.also] if bug.also else [])):
        if (count := text.count(before)) != 1:
            raise Misplanted(f"{bug.name}: {bug.file} has this {count} times, not once: {before!r}")
        text = text.replace(before, after)
    return text


def copy(into: Path) -> None:
    """All that a run needs. Without test_planted.py, which would notice every bug by its text."""
    unwanted = shutil.ignore_patterns("__pycache__", "test_planted.py")
    shutil.copytree(ROOT / "orchestrator", into / "orchestrator", ignore=unwanted)
    shutil.copytree(ROOT / "tests/policy", into / "tests/policy", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", into)


def run(bug: Bug | None, original: Path, into: Path) -> Sequence[Seen]:
    """The tests' outcomes in a fresh copy of `original`. Raises Misplanted where the bug keeps the tests from running at all."""
    shutil.copytree(original, into)
    if bug is not None:
        (into / bug.file).write_text(planted(bug, into))
    name = bug.name if bug else "the code as it is"
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    out = into / "seen.json"
    tests = DECISIONS if bug and bug.file == DECIDE else TESTS  # the allocator's own tests know nothing of decide.py
    command = [sys.executable, "-m", __name__, str(out), *tests]
    done = subprocess.run(command, cwd=into, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if not out.exists():
        raise Misplanted(f"{name}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    counted = _examples(done.stdout)
    found = [Seen(**{**one, "raised": tuple(one["raised"]), "examples": counted.get(one["test"])}) for one in json.loads(out.read_text())]
    if wrong := [f"{one.test}: {', '.join(one.raised)}" for one in found if set(one.raised) & set(MISTAKES)]:
        raise Misplanted(f"{name}: this is no slip but broken code: {wrong[0]}")
    shutil.rmtree(into)
    return found


def _examples(said: str) -> dict[str, int]:
    """What --hypothesis-show-statistics tells: test -> cases that were tried and not thrown away."""
    counted: dict[str, int] = {}
    test = ""
    for line in said.splitlines():
        if match := re.match(r"tests/policy/(test_\w+\.py::\S+):$", line):
            test = match[1]
        elif test and (match := re.search(r"- (\d+) passing", line)):
            counted[test] = counted.get(test, 0) + int(match[1])
    return counted


class Watch:
    """A pytest plugin that notes how each test function ended; of a parametrised one, whether any of its rows failed."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.broken: list[str] = []

    def pytest_sessionstart(self) -> None:
        """Without shrinking: that a case is found is enough, it need not be made small."""
        from hypothesis import Phase, settings  # not before its own pytest plugin has

        settings.register_profile("planted", phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False, database=None)
        settings.load_profile("planted")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(str(report.longrepr))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "call" or call.excinfo is not None:
            test = item.nodeid.removeprefix("tests/policy/").partition("[")[0]
            before = self.seen.get(test)
            raised = {call.excinfo.typename} if call.excinfo is not None else set()
            if before is not None:
                raised |= set(before.raised)
            failed = bool(report.failed) or (before is not None and before.failed)
            self.seen[test] = Seen(test, _kind(item), failed, tuple(sorted(raised)))
        return report


def _kind(item: pytest.Function) -> str:
    if item.path.name == SIMULATION:
        return "simulation"
    return "property" if getattr(item.obj, "is_hypothesis_test", False) else "example"


def main(out: Path, tests: Sequence[str]) -> int:
    here = Path.cwd()
    if Path(orchestrator.__file__).parent != here / "orchestrator":
        print(f"{orchestrator.__file__} would be tested, which is not in {here}")
        return 1
    watch = Watch()
    files = sorted(str(path.relative_to(here)) for name in tests for path in here.glob(f"tests/policy/{name}"))
    pytest.main(["-q", "-p", "no:cacheprovider", "--tb=no", "--hypothesis-show-statistics", *files], plugins=[watch])
    if watch.broken:
        print("\n".join(watch.broken))
        return 1
    out.write_text(json.dumps([asdict(one) for one in watch.seen.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
