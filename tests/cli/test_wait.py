"""The verdict on one state of a model, for each goal: a table, without a daemon."""

import pytest

from orchestrator.cli.wait import Goal, Verdict, verdict

STATES = (
    "stopped",
    "waiting",
    "starting",
    "ready",
    "asleep",
    "waking",
    "draining",
    "stopping",
    "backoff",
    "failed",
    "removed",
)


@pytest.mark.parametrize(
    ("goal", "state", "seen", "since_s", "expected"),
    [
        ("ready", "ready", set(), 900.0, "reached"),
        ("ready", "stopped", set(), 900.0, "go on"),
        ("ready", "stopped", {"starting"}, 0.0, "undone"),
        ("ready", "asleep", set(), 900.0, "go on"),
        ("ready", "asleep", {"waking"}, 0.0, "reached"),
        ("ready", "asleep", {"waiting"}, 0.0, "go on"),
        ("ready", "failed", set(), 900.0, "stale failure"),
        ("ready", "failed", set(), 2.0, "failed"),
        ("ready", "backoff", {"starting"}, 900.0, "failed"),
        ("ready", "removed", set(), 0.0, "undone"),
        ("stopped", "stopped", set(), 0.0, "reached"),
        ("stopped", "failed", set(), 0.0, "stale failure"),
        ("stopped", "removed", set(), 0.0, "undone"),
        ("removed", "removed", set(), 0.0, "reached"),
        ("removed", "failed", set(), 0.0, "go on"),
    ],
)
def test_verdict(goal: Goal, state: str, seen: set[str], since_s: float, expected: Verdict) -> None:
    assert verdict({"name": "m", "state": state, "since_s": since_s}, goal, seen, waited_s=2.0) == expected


@pytest.mark.parametrize("goal", ["ready", "stopped", "removed"])
def test_each_goal_is_reached_by_its_own_state_alone_at_first(goal: Goal) -> None:
    reached = [state for state in STATES if verdict({"state": state}, goal, set(), 0.0) == "reached"]
    assert reached == [goal]
