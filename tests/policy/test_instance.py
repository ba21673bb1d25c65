"""The state diagram: every pair of states against NEXT, and that `to()` is the only thing in the code that moves an instance."""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import orchestrator
from orchestrator.policy.instance import HAS_ENGINE, NEXT, Instance, Launch, State
from orchestrator.policy.model import ModelSpec

LAUNCH = Launch("l1", "orch-m-l1", ModelSpec(name="m", source="org/m"), ("GPU-0",), 1, 1, 1)
S = State

# The diagram once more, drawn from the side of what it means; NEXT must say the same.
START = {(S.STOPPED, S.WAITING), (S.WAITING, S.STARTING), (S.STARTING, S.READY)}
REST = {(S.STARTING, S.ASLEEP), (S.DRAINING, S.ASLEEP), (S.ASLEEP, S.WAKING), (S.WAKING, S.READY)}
END = {(S.READY, S.DRAINING), (S.DRAINING, S.READY), (S.STOPPING, S.STOPPED)}
BREAK = {(state, S.STOPPING) for state in (S.STARTING, S.READY, S.ASLEEP, S.WAKING, S.DRAINING)}
FAIL = {(S.STOPPING, S.BACKOFF), (S.STOPPING, S.FAILED), (S.BACKOFF, S.WAITING), (S.FAILED, S.WAITING)}
LET_GO = {(state, S.STOPPED) for state in (S.WAITING, S.BACKOFF, S.FAILED)}
MOVES = START | REST | END | BREAK | FAIL | LET_GO


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_every_pair_of_states(old: State, new: State) -> None:
    before = Instance("m", old, since=1.0, launch=LAUNCH if old in HAS_ENGINE else None, failures=2)
    assert (new in NEXT[old]) == ((old, new) in MOVES)
    if (old, new) in MOVES:
        moved = before.to(new, 5.0, "because", failures=3)
        assert (moved.state, moved.since, moved.reason, moved.failures) == (new, 5.0, "because", 3)
        assert (before.state, before.since, before.failures) == (old, 1.0, 2)
        assert moved.launch == (before.launch if new in HAS_ENGINE else None)
    else:
        with pytest.raises(ValueError, match=f"m: no move from {old} to {new} .because."):
            before.to(new, 5.0, "because")


def test_every_state_is_in_the_diagram_can_be_reached_and_left() -> None:
    assert set(NEXT) == set(State)
    reached, edge = set[State](), {S.STOPPED}
    while edge:
        reached |= edge
        edge = {new for old in edge for new in NEXT[old]} - reached
    assert reached == set(State)
    assert all(NEXT[state] - {state} for state in State)


def test_an_engine_begins_with_starting_and_ends_with_stopping() -> None:
    """So nothing without an engine holds a launch, and no engine is forgotten."""
    for old, new in MOVES:
        if old not in HAS_ENGINE and new in HAS_ENGINE:
            assert new is S.STARTING
        if old in HAS_ENGINE and new not in HAS_ENGINE:
            assert old is S.STOPPING


def test_a_launch_given_with_the_move_is_kept() -> None:
    assert Instance("m", S.WAITING).to(S.STARTING, 1.0, "its turn", launch=LAUNCH).launch is LAUNCH


def test_an_instance_can_not_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        Instance("m").state = S.READY  # type: ignore[misc]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_to_is_the_only_mover() -> None:
    """No `replace(instance, state=…)` anywhere but in `to()`, and no Instance that is born in a state other than by adoption."""
    moved, born = [], []
    for path in Path(orchestrator.__file__).parent.rglob("*.py"):
        for call in _calls(ast.parse(path.read_text())):
            name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""
            where = f"{path.parent.name}/{path.name}"
            if name in ("replace", "__replace__", "_replace") and any(word.arg == "state" for word in call.keywords):
                moved.append(where)
            if name == "Instance" and (len(call.args) > 1 or any(word.arg == "state" for word in call.keywords)):
                born.append(where)
    assert moved == ["policy/instance.py"]
    assert born == ["control/reconciler.py"]
