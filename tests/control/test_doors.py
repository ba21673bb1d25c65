"""What requests find at a model's door, for each of its states: a table."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.control.doors import door
from orchestrator.policy.decide import Plan
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import HAS_ENGINE, Instance, Launch, State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, Snapshot

NOW = 1000.0
S = State
SPEC = ModelSpec(name="m", source="org/m", max_queue=7)
KNOWN = Known(SPEC, Footprint("learned", start_s=20.0, wake_s=3.0, sleep_s=2.0, sleep_again_s=1.0))
LAUNCH = Launch("l1", "orch-m-l1", SPEC, ("GPU-0",), 1, 1, 1, expected_start_s=20.0)
SEEN = EngineSeen("l1", alive=True, phase="loading weights")


def found(state: State, known: Known = KNOWN, ago: float = 5.0, **fields: Any) -> Any:
    instance = Instance("m", state, NOW - ago, "because", LAUNCH if state in HAS_ENGINE else None, **fields)
    plan = Plan((), {"m": instance}, {}, {}, {}, {})
    return door("m", known, plan, Snapshot(NOW, {}, {"l1": SEEN}, {}))


@pytest.mark.parametrize(
    ("state", "fields", "seconds", "phase"),
    [
        (S.STOPPED, {}, 20, "stopped, because"),
        (S.WAITING, {}, 20, "waiting, because"),
        (S.WAITING, {"retry_at": NOW + 8}, 28, "waiting, because"),
        (S.STARTING, {}, 15, "starting, loading weights"),
        (S.STARTING, {"ago": 60.0}, 1, "starting, loading weights"),
        (S.ASLEEP, {}, 3, "asleep, because"),
        (S.ASLEEP, {"retry_at": NOW + 8}, 11, "asleep, because"),
        (S.WAKING, {"ago": 1.0}, 2, "waking, because"),
        (S.DRAINING, {}, 20, "draining, because"),
        (S.DRAINING, {"sent_at": NOW, "ago": 1.0}, 4, "draining, because"),
        (S.DRAINING, {"sent_at": NOW, "ago": 1.0, "slept": True}, 3, "draining, because"),
        (S.STOPPING, {}, 20, "stopping, because"),
        (S.BACKOFF, {"retry_at": NOW + 16}, 36, "backoff, because"),
    ],
)
def test_who_waits_is_told_how_long_and_for_what(state: State, fields: dict[str, Any], seconds: int, phase: str) -> None:
    shown = found(state, **fields)
    assert (shown.launch_id, shown.error, shown.retry_after_s, shown.phase) == (None, None, seconds, phase)
    assert (shown.max_queue, shown.timed) == (7, True)


def test_a_guess_is_said_to_be_one() -> None:
    assert not found(S.STOPPED, replace(KNOWN, footprint=Footprint("estimated"))).timed


def test_only_a_ready_one_is_open() -> None:
    assert {state for state in State if found(state).launch_id} == {S.READY}


@pytest.mark.parametrize(
    ("known", "state", "code"), [(replace(KNOWN, held=True), S.READY, "model_stopped"), (KNOWN, S.FAILED, "model_failed")]
)
def test_shut_where_waiting_would_not_help(known: Known, state: State, code: str) -> None:
    assert found(state, known).error.code == code
    assert door("m", None, Plan((), {}, {}, {}, {}, {}), Snapshot(NOW, {}, {}, {})).error is not None
