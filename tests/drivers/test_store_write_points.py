"""Killed at every call of SQLite that writes, or on a full disk from it on: what was answered holds, the rest is whole or absent."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.write_points import STEPS

ROOT = Path(__file__).resolve().parents[2]
BEFORE = ("none", "old", "clean", "hot", "full-log")


def points(folder: Path, before: str, mode: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.support.write_points", str(folder), before, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 40, "SQLite's calls are not seen"
    last = found[-1]
    assert (last["code"], last["answered"][-1]) == (0, "close"), "the last life met no fault"
    return found


def after(before: str, steps: list[str]) -> list[str]:
    models = set() if before == "none" else {"a", "b"}
    for step in steps:
        (models.add if step[0] == "+" else models.discard)(step[1:])
    return sorted(models)


@pytest.mark.parametrize("mode", ["kill", "torn"])
@pytest.mark.parametrize("before", BEFORE)
def test_a_kill_at_any_write_point_loses_nothing_that_was_answered(tmp_path: Path, before: str, mode: str) -> None:
    steps = [step for step in STEPS if step != "-a" or before != "none"]
    for point in points(tmp_path, before, mode):
        answered = [said for said in point["answered"] if said in steps]
        unanswered = steps[: len(answered) + 1]
        assert point["models"] in (after(before, answered), after(before, unanswered)), point
        assert (point["integrity"], point["whole"], point["problem"]) == ("ok", True, None), point
        was_changed = before not in ("none", "old")
        if was_changed and "-a" not in unanswered:
            assert point["changed"] == ["a"], point
        elif "-a" in answered or not was_changed:
            assert point["changed"] == [], point
        else:  # gone with its model, or there with it
            assert point["changed"] == [name for name in point["models"] if name == "a"], point


@pytest.mark.parametrize("before", BEFORE)
def test_a_full_disk_at_any_write_point_refuses_changes_nothing_and_heals(tmp_path: Path, before: str) -> None:
    """That nothing is half done is asserted in the process itself (write_points.on_a_full_disk)."""
    steps = [step for step in STEPS if step != "-a" or before != "none"]
    found = points(tmp_path, before, "full")
    for point in found:
        assert [said for said in point["answered"] if said != "refused"] == ["open", *steps, "close"], point
        assert point["models"] == after(before, steps), point
        assert (point["integrity"], point["whole"], point["problem"]) == ("ok", True, None), point
    assert {"refused"} < {said for point in found for said in point["answered"]}
