"""The verdict on one state of a model, for each goal: a table, without a daemon."""

import pytest

from orchestrator.cli.wait import STALE_S, Goal, Verdict, verdict

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
        ("ready", "failed", set(), 900.0, "stale"),
        ("ready", "failed", set(), 2.0, "failed"),
        ("ready", "backoff", {"starting"}, 900.0, "failed"),
        ("ready", "removed", set(), 0.0, "undone"),
        ("stopped", "stopped", set(), 0.0, "reached"),
        ("stopped", "failed", set(), 0.0, "stale"),
        ("stopped", "removed", set(), 0.0, "undone"),
        ("removed", "removed", set(), 0.0, "reached"),
        ("removed", "failed", set(), 0.0, "go on"),
        ("ready", "stopped", {"draining", "stopping"}, 0.0, "go on"),  # what another order began
        ("asleep", "asleep", set(), 900.0, "reached"),
        ("asleep", "ready", set(), 900.0, "stale"),
        ("asleep", "ready", {"draining"}, 0.0, "undone"),
        ("asleep", "draining", set(), 900.0, "go on"),
        ("asleep", "waking", set(), 0.0, "go on"),
        ("asleep", "ready", {"waking"}, 0.0, "stale"),
        ("asleep", "stopped", {"draining", "stopping"}, 0.0, "undone"),
        ("asleep", "backoff", {"draining", "stopping"}, 900.0, "failed"),
        ("asleep", "removed", set(), 0.0, "undone"),
        ("unloaded", "stopped", set(), 900.0, "reached"),
        ("unloaded", "ready", set(), 900.0, "stale"),
        ("unloaded", "ready", {"draining"}, 0.0, "undone"),
        ("unloaded", "asleep", set(), 900.0, "stale"),
        ("unloaded", "draining", set(), 0.0, "go on"),
        ("unloaded", "waiting", {"draining", "stopping"}, 0.0, "reached"),
        ("unloaded", "waiting", set(), 900.0, "stale"),
        ("unloaded", "failed", set(), 900.0, "reached"),
        ("unloaded", "backoff", set(), 900.0, "stale"),
        ("unloaded", "backoff", {"draining", "stopping"}, 0.0, "failed"),
    ],
)
def test_verdict(goal: Goal, state: str, seen: set[str], since_s: float, expected: Verdict) -> None:
    assert verdict({"name": "m", "state": state, "since_s": since_s}, goal, seen, waited_s=2.0) == expected


@pytest.mark.parametrize(
    ("goal", "states"),
    [
        ("ready", ["ready"]),
        ("asleep", ["asleep"]),
        ("unloaded", ["stopped", "failed"]),  # neither has an engine
        ("stopped", ["stopped"]),
        ("removed", ["removed"]),
    ],
)
def test_each_goal_is_reached_by_its_own_states_alone_at_first(goal: Goal, states: list[str]) -> None:
    assert [state for state in STATES if verdict({"state": state}, goal, set(), 0.0) == "reached"] == states


@pytest.mark.parametrize("state", ["asleep", "stopped"])
def test_a_model_that_is_not_wanted_any_more_is_not_waited_for(state: str) -> None:
    assert verdict({"state": state, "wanted": "ready"}, "ready", set(), 2.0) == "go on"
    for wanted in ("asleep", "nothing"):
        assert verdict({"state": state, "wanted": wanted}, "ready", set(), 2.0) == "undone"


@pytest.mark.parametrize("goal", ["asleep", "unloaded"])
def test_a_model_that_stays_ready_is_in_use(goal: Goal) -> None:
    """However often it is told anew: each request that comes is a change."""
    assert verdict({"state": "ready", "since_s": 900.0}, goal, set(), waited_s=STALE_S + 0.1) == "undone"
    assert verdict({"state": "ready", "since_s": 0.2}, goal, set(), waited_s=60.0) == "stale"  # it has just woken
