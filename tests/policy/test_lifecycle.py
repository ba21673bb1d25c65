"""One model's moves: for each state what is wanted × what is seen -> the next state, its reason and its actions.

A row is one look. Rows need no history, which is the point: how an instance came into its state must not matter.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from orchestrator.policy.actions import Action, Learn, Stop
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import HAS_ENGINE, NEXT, Failure, Instance, Launch, State, Then
from orchestrator.policy.lifecycle import RETURN_TIMEOUT_S, Known, Rules, Want, step, wanted
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.restart import MAX_FAILURES, STABLE_S
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, Snapshot, TrafficSeen
from orchestrator.policy.units import GIB

NOW = 10_000.0
S = State
SPEC = ModelSpec(name="m", source="org/m", idle_timeout=100.0, start_timeout=60.0)
LAUNCH = Launch("l1", "orch-m-l1", SPEC, ("GPU-a", "GPU-b"), 10 * GIB, GIB, 50 * GIB)
FOOTPRINT = Footprint("estimated", bundle_bytes=96 << 20)
RULES = Rules(drain_timeout_s=60.0)

# what is wanted
ASKED = TrafficSeen(waiting=2)
SERVING = TrafficSeen(in_flight=3, waiting=1, last_used=NOW)
LATELY = TrafficSeen(last_used=NOW - 99)
IDLE = TrafficSeen(last_used=NOW - 101)
NOBODY = TrafficSeen()
KNOWN = Known(SPEC, FOOTPRINT)
HELD = replace(KNOWN, held=True)
CHANGED = replace(KNOWN, spec=SPEC.model_copy(update={"args": ("--enforce-eager",)}))
HEAVIER = replace(KNOWN, spec=SPEC.model_copy(update={"priority": 3, "kv_weight": 2.0}))

# what is seen of its engine
LOADING = EngineSeen("l1", alive=True, phase="loading weights", started_at=NOW - 7.5, pids=frozenset({11, 12}))
READY = replace(LOADING, ready=True, phase="ready", segment=Segment(9 * GIB, GIB, GIB))
BROKEN = replace(READY, error="two answers in a row were empty", log_tail=("last words",))
DEAD = replace(LOADING, alive=False, log_tail=("CUDA out of memory",))
MISTAKEN = replace(DEAD, log_tail=("vllm: error: unrecognized arguments: --foo",))
GONE = replace(DEAD, gone=True)
HINDERED = replace(LOADING, phase="spawning", error="disk full", hindered=True)
UNDYING = replace(DEAD, undying="pid 12 (state D)")


def snapshot(seen: EngineSeen | None, traffic: TrafficSeen, processes: Mapping[int, int] | None = None) -> Snapshot:
    first = GpuReading("GPU-a", 0, "H200", 140 * GIB, 100 * GIB, processes or {})
    return Snapshot(NOW, {"GPU-a": first}, {seen.launch_id: seen} if seen else {}, {"m": traffic})


def at(state: State, ago: float = 10.0, **fields: Any) -> Instance:
    launch = LAUNCH if state in HAS_ENGINE else None
    return Instance("m", state, NOW - ago, "as before", launch, **fields)


@dataclass(frozen=True)
class Row:
    name: str
    before: Instance
    known: Known | None
    traffic: TrafficSeen
    seen: EngineSeen | None
    state: State
    reason: str = "as before"
    stops: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


FAILURE = Failure("the engine died", ("CUDA out of memory",), NOW - 10, was_ready=True)
FAILING: dict[str, Any] = {"failing": True, "failures": 1, "failure": FAILURE}
FIRST: dict[str, Any] = {"failing": True, "failures": 1}

SLEEPY = Known(SPEC.model_copy(update={"sleep_timeout": 20.0}), FOOTPRINT)
SLEEPLESS = Known(SPEC.model_copy(update={"sleep_timeout": 20.0, "sleep_level": 0}), FOOTPRINT)
QUIET = TrafficSeen(last_used=NOW - 30)
RESTED = replace(KNOWN, rested_at=NOW - 1, rest=Want.ASLEEP)
DRAINED = replace(KNOWN, drained_at=NOW - 1)
SLEEPS: dict[str, Any] = {"then": Then.SLEEP}
SENT: dict[str, Any] = {"then": Then.SLEEP, "sent_at": NOW - 5}
SLEEPING = replace(READY, asleep=True, sleep_s=0.3, host_bytes=GIB)
CUT, LATE, BROKE = "as before; 3 requests cut after 60s", "not asleep after 301s", "the engine failed: two answers in a row were empty"

ROWS = [
    Row("nobody wants it", at(S.STOPPED), KNOWN, NOBODY, None, S.STOPPED),
    Row("a request comes", at(S.STOPPED), KNOWN, ASKED, None, S.WAITING, "2 requests"),
    Row("old failures are forgotten", at(S.STOPPED, failures=3), KNOWN, ASKED, None, S.WAITING, "2 requests", fields={"failures": 0}),
    Row(
        "it failed lately, and its time has come",
        at(S.STOPPED, **(FAILING | {"failing": False, "retry_at": NOW})),
        KNOWN,
        ASKED,
        None,
        S.WAITING,
        "2 requests",
        fields={"failures": 1},
    ),
    Row("it failed just now", at(S.STOPPED, **(FAILING | {"failing": False, "retry_at": NOW + 1})), KNOWN, ASKED, None, S.STOPPED),
    Row(
        "it failed just now, and is started by hand",
        at(S.STOPPED, **(FAILING | {"failing": False, "retry_at": NOW + 1})),
        replace(KNOWN, started_at=NOW),
        NOBODY,
        None,
        S.WAITING,
        "asked for",
        fields={"failures": 0},
    ),
    Row(
        "it failed long ago",
        at(S.STOPPED, failures=4, failure=replace(FAILURE, at=NOW - STABLE_S - 1)),
        KNOWN,
        ASKED,
        None,
        S.WAITING,
        "2 requests",
        fields={"failures": 0},
    ),
    Row("an operator holds it", at(S.STOPPED), HELD, ASKED, None, S.STOPPED),
    Row("an operator starts it", at(S.STOPPED), replace(KNOWN, started_at=NOW), NOBODY, None, S.WAITING, "asked for"),
    Row("it goes on waiting", at(S.WAITING), KNOWN, ASKED, None, S.WAITING),
    Row("nobody waits any more", at(S.WAITING), KNOWN, NOBODY, None, S.STOPPED, "nobody has asked for it yet"),
    Row("removed while it waits", at(S.WAITING, reserved=True), None, ASKED, None, S.STOPPED, "removed", fields={"reserved": False}),
    Row("held while it waits", at(S.WAITING), HELD, ASKED, None, S.STOPPED, "stopped by an operator"),
    Row("it loads", at(S.STARTING), KNOWN, ASKED, LOADING, S.STARTING),
    Row("it is ready", at(S.STARTING), KNOWN, ASKED, READY, S.READY, "started in 7.5s"),
    Row("found ready", at(S.STARTING), KNOWN, ASKED, replace(READY, adopted=True), S.READY, "answers"),
    Row("no engine is there", at(S.STARTING), KNOWN, ASKED, None, S.STOPPING, "the engine did not start", True, FIRST),
    Row("it died loading", at(S.STARTING), KNOWN, ASKED, DEAD, S.STOPPING, "the engine did not start", True, FIRST),
    Row(
        "it says why",
        at(S.STARTING),
        KNOWN,
        ASKED,
        BROKEN,
        S.STOPPING,
        "the engine did not start: two answers in a row were empty",
        True,
        FIRST,
    ),
    Row("ready but dead", at(S.STARTING), KNOWN, ASKED, replace(READY, alive=False), S.STOPPING, "the engine did not start", True, FIRST),
    Row("at the time limit", at(S.STARTING, 60.0), KNOWN, ASKED, LOADING, S.STARTING),
    Row(
        "past it",
        at(S.STARTING, 60.1),
        KNOWN,
        ASKED,
        LOADING,
        S.STOPPING,
        "not ready after 60s (start_timeout); it was at: loading weights",
        True,
        FIRST,
    ),
    Row("ready past it", at(S.STARTING, 61.0), KNOWN, ASKED, READY, S.READY, "started in 7.5s"),
    Row("removed loading", at(S.STARTING), None, ASKED, LOADING, S.STOPPING, "removed", True, {"failing": False}),
    Row("a start is carried through", at(S.STARTING), KNOWN, IDLE, LOADING, S.STARTING),
    Row("asked for by hand, long ago", at(S.WAITING), replace(KNOWN, started_at=NOW - 500), NOBODY, None, S.WAITING),
    Row("held, ready", at(S.STARTING), HELD, ASKED, READY, S.STOPPING, "stopped by an operator", True, {"failing": False}),
    Row("it serves", at(S.READY), KNOWN, SERVING, READY, S.READY),
    Row("used lately", at(S.READY), KNOWN, LATELY, READY, S.READY),
    Row("idle", at(S.READY, ago=200.0), KNOWN, IDLE, READY, S.DRAINING, "idle for 100s"),
    Row("idle before it was ready", at(S.READY), KNOWN, IDLE, READY, S.READY),
    Row("held", at(S.READY), HELD, SERVING, READY, S.DRAINING, "stopped by an operator"),
    Row("removed", at(S.READY), None, SERVING, READY, S.DRAINING, "removed"),
    Row("another spec", at(S.READY), CHANGED, SERVING, READY, S.DRAINING, "its spec changed"),
    Row("another weight", at(S.READY), HEAVIER, SERVING, READY, S.READY),
    Row("it died", at(S.READY), KNOWN, SERVING, DEAD, S.STOPPING, "the engine died", True, FIRST),
    Row("it vanished", at(S.READY), KNOWN, SERVING, None, S.STOPPING, "the engine died", True, FIRST),
    Row("it broke", at(S.READY), KNOWN, SERVING, BROKEN, S.STOPPING, BROKE, True, FIRST),
    Row("it broke draining", at(S.DRAINING), HELD, SERVING, BROKEN, S.STOPPING, BROKE, True, FIRST),
    Row(
        "the daemon could not start it",
        at(S.STARTING, failures=2),
        KNOWN,
        ASKED,
        HINDERED,
        S.STOPPING,
        "the engine did not start: disk full",
        True,
        {"failing": True, "failures": 2},
    ),
    Row("dead and unwanted", at(S.READY), HELD, NOBODY, DEAD, S.STOPPING, "the engine died", True, FIRST),
    Row("again too soon", at(S.READY, STABLE_S, failures=2), KNOWN, SERVING, DEAD, S.STOPPING, "the engine died", True, {"failures": 3}),
    Row("after an hour", at(S.READY, 3600.0, failures=2), KNOWN, SERVING, DEAD, S.STOPPING, "the engine died", True, {"failures": 1}),
    Row("not yet stable", at(S.READY, STABLE_S, failures=2), KNOWN, SERVING, READY, S.READY, fields={"failures": 2}),
    Row(
        "forgiven",
        at(S.READY, STABLE_S + 1, **(FAILING | {"failing": False})),
        KNOWN,
        SERVING,
        READY,
        S.READY,
        fields={"failures": 0, "failure": None},
    ),
    Row("it finishes", at(S.DRAINING), HELD, SERVING, READY, S.DRAINING),
    Row("it has finished", at(S.DRAINING), HELD, NOBODY, READY, S.STOPPING, "as before", True, {"failing": False}),
    Row("waiting is not serving", at(S.DRAINING), HELD, ASKED, READY, S.STOPPING, "as before", True),
    Row("its time is not over", at(S.DRAINING, 60.0), None, SERVING, READY, S.DRAINING),
    Row("its time is over", at(S.DRAINING, 60.1), None, SERVING, READY, S.STOPPING, "as before; 3 requests cut after 60s", True),
    Row("wanted again", at(S.DRAINING), KNOWN, ASKED, READY, S.READY, "wanted again: 2 requests"),
    Row("wanted, otherwise", at(S.DRAINING), CHANGED, SERVING, READY, S.DRAINING),
    Row("wanted otherwise, done", at(S.DRAINING), CHANGED, ASKED, READY, S.STOPPING, "as before", True),
    Row("it dies draining", at(S.DRAINING), HELD, SERVING, DEAD, S.STOPPING, "the engine died", True, FIRST),
    Row("processes are left", at(S.STOPPING), KNOWN, ASKED, DEAD, S.STOPPING),
    Row(
        "one can not be killed", at(S.STOPPING, 1e6), KNOWN, ASKED, UNDYING, S.STOPPING, "as before; SIGKILL does not end pid 12 (state D)"
    ),
    Row(
        "it ended after all",
        replace(at(S.STOPPING), reason="as before; SIGKILL does not end pid 12 (state D)"),
        KNOWN,
        ASKED,
        GONE,
        S.STOPPED,
    ),
    Row(
        "after a full disk",
        at(S.STOPPING, failing=True, failures=4, failure=replace(FAILURE, hindered=True)),
        KNOWN,
        ASKED,
        GONE,
        S.BACKOFF,
        "as before; no failure of the engine, tried again in 10s",
        fields={"retry_at": NOW + 10, "failing": False, "failures": 4},
    ),
    Row("all is gone", at(S.STOPPING), KNOWN, ASKED, GONE, S.STOPPED),
    Row("nothing known of it", at(S.STOPPING), KNOWN, ASKED, None, S.STOPPED),
    Row(
        "after a failure",
        at(S.STOPPING, **FAILING),
        KNOWN,
        ASKED,
        GONE,
        S.BACKOFF,
        "as before; attempt 2 of 5 in 2s",
        fields={"retry_at": NOW + 2, "failing": False},
    ),
    Row(
        "failed again",
        at(S.STOPPING, **(FAILING | {"failures": 4})),
        KNOWN,
        ASKED,
        GONE,
        S.BACKOFF,
        "as before; attempt 5 of 5 in 16s",
        fields={"retry_at": NOW + 16},
    ),
    Row(
        "failed too often",
        at(S.STOPPING, **(FAILING | {"failures": MAX_FAILURES})),
        KNOWN,
        ASKED,
        GONE,
        S.FAILED,
        "as before; failed 5 times in a row: mend the cause, then start it by hand",
    ),
    Row("hindered only", at(S.BACKOFF, retry_at=NOW), KNOWN, ASKED, None, S.WAITING, "trying again"),
    Row("not time yet", at(S.BACKOFF, retry_at=NOW + 0.1, failures=2), KNOWN, ASKED, None, S.BACKOFF),
    Row(
        "time",
        at(S.BACKOFF, retry_at=NOW, failures=2),
        KNOWN,
        ASKED,
        None,
        S.WAITING,
        "trying again after 2 failures",
        fields={"failures": 2},
    ),
    Row(
        "sooner by hand",
        at(S.BACKOFF, retry_at=NOW + 9, failures=2),
        replace(KNOWN, started_at=NOW - 1),
        ASKED,
        None,
        S.WAITING,
        "trying again after 2 failures",
    ),
    Row("started before", at(S.BACKOFF, retry_at=NOW + 9, failures=2), replace(KNOWN, started_at=NOW - 11), ASKED, None, S.BACKOFF),
    Row("given up in backoff", at(S.BACKOFF, retry_at=NOW + 9), HELD, ASKED, None, S.STOPPED, "stopped by an operator"),
    Row("removed in backoff", at(S.BACKOFF), None, ASKED, None, S.STOPPED, "removed"),
    Row("failed stays failed", at(S.FAILED), KNOWN, ASKED, None, S.FAILED),
    Row("failed, unwanted", at(S.FAILED), KNOWN, NOBODY, None, S.FAILED),
    Row("failed, removed", at(S.FAILED), None, ASKED, None, S.STOPPED, "removed"),
    Row("failed, held", at(S.FAILED), HELD, ASKED, None, S.STOPPED, "stopped by an operator"),
    Row(
        "failed, started by hand",
        at(S.FAILED, failures=5, failure=FAILURE),
        replace(KNOWN, started_at=NOW - 1),
        NOBODY,
        None,
        S.WAITING,
        "started by an operator",
        fields={"failures": 0, "failure": None},
    ),
    Row("failed, started before", at(S.FAILED), replace(KNOWN, started_at=NOW - 11), ASKED, None, S.FAILED),
    Row("idle, it sleeps first", at(S.READY, ago=200.0), SLEEPY, QUIET, READY, S.DRAINING, "idle for 20s", fields=SLEEPS),
    Row("by its last failure it may not survive that", at(S.READY, 200.0, failures=1), SLEEPY, QUIET, READY, S.READY),
    Row("it can not sleep", replace(at(S.READY, ago=200.0), launch=replace(LAUNCH, spec=SLEEPLESS.spec)), SLEEPLESS, QUIET, READY, S.READY),
    Row("put to sleep", at(S.READY), RESTED, LATELY, READY, S.DRAINING, "put to sleep by an operator", fields=SLEEPS),
    Row("used since", at(S.READY), RESTED, TrafficSeen(last_used=NOW), READY, S.READY),
    Row("unloaded", at(S.READY), replace(RESTED, rest=Want.NOTHING), LATELY, READY, S.DRAINING, "unloaded by an operator"),
    Row("drained", at(S.READY), DRAINED, SERVING, READY, S.DRAINING, "drained by an operator", fields={"yielded_at": NOW}),
    Row("drained on its way to sleep", at(S.DRAINING, then=Then.SLEEP), DRAINED, ASKED, READY, S.STOPPING, "drained by an operator", True),
    Row(
        "drained when it was wanted again",
        at(S.DRAINING),
        DRAINED,
        SERVING,
        READY,
        S.DRAINING,
        "drained by an operator",
        fields={"yielded_at": NOW},
    ),
    Row("drained before it was ready", at(S.READY, 0.5), DRAINED, SERVING, READY, S.READY),
    Row("it waits for its turn to sleep", at(S.DRAINING, **SLEEPS), SLEEPY, QUIET, READY, S.DRAINING),
    Row("a request is quicker", at(S.DRAINING, **SLEEPS), SLEEPY, ASKED, READY, S.READY, "wanted again: 2 requests"),
    Row("a request is too late", at(S.DRAINING, **SENT), SLEEPY, ASKED, READY, S.DRAINING),
    Row("who yields does not come back", at(S.DRAINING, 90.0, yielded_at=NOW), KNOWN, SERVING, READY, S.DRAINING),
    Row("who yields goes when it is done", at(S.DRAINING, yielded_at=NOW), KNOWN, ASKED, READY, S.STOPPING, "as before", True),
    Row("removed while it yields", at(S.DRAINING, 90.0, yielded_at=NOW), None, SERVING, READY, S.STOPPING, CUT, True),
    Row("held while it waits to sleep", at(S.DRAINING, **SLEEPS), HELD, QUIET, READY, S.STOPPING, "as before", True),
    Row("it sleeps", at(S.DRAINING, **SENT), SLEEPY, QUIET, SLEEPING, S.ASLEEP),
    Row("it does not sleep", at(S.DRAINING, **(SENT | {"sent_at": NOW - 301})), SLEEPY, QUIET, READY, S.STOPPING, LATE, True, FIRST),
    Row("it broke in falling asleep", at(S.DRAINING, **SENT), SLEEPY, QUIET, BROKEN, S.STOPPING, BROKE, True, FIRST),
    Row("it goes on sleeping", at(S.ASLEEP), SLEEPY, QUIET, SLEEPING, S.ASLEEP),
    Row("it wakes when there is room", at(S.ASLEEP), SLEEPY, ASKED, SLEEPING, S.ASLEEP),
    Row("nobody asks any more", at(S.ASLEEP, reserved=True), SLEEPY, QUIET, SLEEPING, S.ASLEEP, fields={"reserved": False}),
    Row("slept long enough", at(S.ASLEEP), SLEEPY, IDLE, SLEEPING, S.STOPPING, "idle for 100s", True, {"failing": False}),
    Row("found asleep a while ago", at(S.ASLEEP, 99.0), SLEEPY, NOBODY, SLEEPING, S.ASLEEP),
    Row("found asleep long ago", at(S.ASLEEP, 101.0), SLEEPY, NOBODY, SLEEPING, S.STOPPING, "idle for 100s", True),
    Row("sent to sleep, long ago", at(S.ASLEEP, 101.0, yielded_at=NOW - 102), SLEEPY, IDLE, SLEEPING, S.STOPPING, "idle for 100s", True),
    Row("sent to sleep", at(S.ASLEEP, yielded_at=NOW - 12), KNOWN, LATELY, SLEEPING, S.ASLEEP),
    Row("sent away", at(S.STOPPED, yielded_at=NOW - 12), KNOWN, LATELY, None, S.STOPPED),
    Row("sent away, asked for", at(S.STOPPED, yielded_at=NOW - 12), KNOWN, ASKED, None, S.WAITING, "2 requests"),
    Row("held asleep", at(S.ASLEEP), HELD, QUIET, SLEEPING, S.STOPPING, "stopped by an operator", True),
    Row("another spec asleep", at(S.ASLEEP), CHANGED, ASKED, SLEEPING, S.STOPPING, "its spec changed", True),
    Row("it died asleep", at(S.ASLEEP), SLEEPY, QUIET, DEAD, S.STOPPING, "the engine died in its sleep", True, FIRST),
    Row("it is waking", at(S.WAKING), SLEEPY, ASKED, SLEEPING, S.WAKING),
    Row("a wake is carried through", at(S.WAKING), SLEEPY, QUIET, SLEEPING, S.WAKING),
    Row("it is awake", at(S.WAKING), SLEEPY, ASKED, replace(READY, wake_s=0.33), S.READY, "woke in 0.33s"),
    Row("it does not wake", at(S.WAKING, 121.0), SLEEPY, ASKED, SLEEPING, S.STOPPING, "not awake after 120s", True, FIRST),
    Row("it died waking", at(S.WAKING), SLEEPY, ASKED, DEAD, S.STOPPING, "the engine did not wake", True, FIRST),
    Row("held waking", at(S.WAKING), HELD, ASKED, SLEEPING, S.STOPPING, "stopped by an operator", True, {"failing": False}),
    Row("found asleep", at(S.STARTING), SLEEPY, QUIET, replace(SLEEPING, adopted=True), S.ASLEEP, "found asleep"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.before.state}: {row.name}")
def test_one_look(row: Row) -> None:
    after, actions = step(row.before, row.known, snapshot(row.seen, row.traffic), RULES)
    assert (after.state, after.reason) == (row.state, row.reason)
    assert [action for action in actions if isinstance(action, Stop)] == ([Stop("l1", "m", row.reason)] if row.stops else [])
    assert {name: getattr(after, name) for name in row.fields} == dict(row.fields)
    assert after.since == (NOW if after.state is not row.before.state else row.before.since)
    assert after.launch == (row.before.launch if after.state in HAS_ENGINE else None)


def test_every_move_of_the_diagram_that_step_makes_is_in_the_table() -> None:
    """Who may start or wake is decided between models, and so is who is stopped for another."""
    moves = {(row.before.state, row.state) for row in ROWS if row.before.state is not row.state}
    all_moves = {(old, new) for old, news in NEXT.items() for new in news}
    elsewhere = {(S.WAITING, S.STARTING), (S.ASLEEP, S.WAKING)}
    failed = {(S.STOPPING, S.FAILED), (S.STOPPING, S.BACKOFF)}
    assert (moves - elsewhere) | failed == all_moves - elsewhere


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.before.state}: {row.name}")
def test_the_same_look_again_asks_for_nothing_twice_in_the_same_state(row: Row) -> None:
    """Level-triggered: what is decided depends on what is seen, so a second look at the same world may only go on from there."""
    world = snapshot(row.seen, row.traffic)
    instance = row.before
    for _ in range(8):
        after, actions = step(instance, row.known, world, RULES)
        assert after.state is instance.state or after.state in NEXT[instance.state]
        assert not actions or after.state is not instance.state
        instance = after


WANTED: list[tuple[Known | None, TrafficSeen, Want, str]] = [
    (None, SERVING, Want.NOTHING, "removed"),
    (HELD, SERVING, Want.NOTHING, "stopped by an operator"),
    (KNOWN, SERVING, Want.READY, "4 requests"),
    (KNOWN, NOBODY, Want.NOTHING, "nobody has asked for it yet"),
    (KNOWN, LATELY, Want.READY, "used lately"),
    (KNOWN, TrafficSeen(last_used=NOW - 100), Want.NOTHING, "idle for 100s"),
    (replace(KNOWN, started_at=NOW - 99), IDLE, Want.READY, "asked for"),
    (replace(KNOWN, started_at=NOW - 101), NOBODY, Want.NOTHING, "idle for 100s"),
    (Known(SPEC.model_copy(update={"pinned": True}), FOOTPRINT), IDLE, Want.READY, "pinned"),
    (Known(SPEC.model_copy(update={"pinned": True}), FOOTPRINT), NOBODY, Want.NOTHING, "nobody has asked for it yet"),
    (Known(SPEC.model_copy(update={"idle_timeout": None}), FOOTPRINT), IDLE, Want.READY, "it has no idle timeout"),
    (Known(SPEC.model_copy(update={"idle_timeout": None}), FOOTPRINT, held=True), SERVING, Want.NOTHING, "stopped by an operator"),
]


@pytest.mark.parametrize(("known", "traffic", "want", "why"), WANTED)
def test_what_is_wanted_and_why(known: Known | None, traffic: TrafficSeen, want: Want, why: str) -> None:
    assert wanted(known, traffic, Instance("m"), NOW) == (want, why)


def learned(actions: list[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, Learn)]


def test_a_start_is_learned_from() -> None:
    """The peak is what NVML showed at worst on one GPU less its KV, over all looks; the rest what is held once it is ready."""
    starting = at(S.STARTING)
    for loading, mapped, peak in ((6, 0, 6), (14, 1, 13), (9, 2, 13)):
        seen = replace(LOADING, segment=Segment(9 * GIB, mapped * GIB, 0) if mapped else None)
        starting, actions = step(starting, KNOWN, snapshot(seen, ASKED, {11: (loading - 1) * GIB, 12: GIB, 99: 50 * GIB}), RULES)
        assert (starting.state, starting.peak_bytes, actions) == (S.STARTING, peak * GIB, [])
    ready, actions = step(starting, KNOWN, snapshot(READY, ASKED, {11: 11 * GIB, 99: 50 * GIB}), RULES)
    assert ready.state is S.READY
    assert actions == [Learn("m", SPEC.footprint_key(), {"start_bytes": 13 * GIB, "ready_bytes": 9 * GIB, "start_s": 7.5})]


@pytest.mark.parametrize(
    ("seen", "processes"),
    [(replace(READY, adopted=True), {11: 11 * GIB}), (READY, {}), (READY, {99: 11 * GIB})],
    ids=["adopted", "the driver hides processes", "others' processes"],
)
def test_what_was_not_seen_is_not_learned(seen: EngineSeen, processes: dict[int, int]) -> None:
    after, actions = step(at(S.STARTING), KNOWN, snapshot(seen, ASKED, processes), RULES)
    assert after.state is S.READY
    assert learned(actions) == []


def test_a_model_removed_while_it_loads_keeps_to_the_timeout_it_was_started_with() -> None:
    patient = replace(KNOWN, spec=SPEC.model_copy(update={"start_timeout": 600.0}))
    assert step(at(S.STARTING, 61.0), patient, snapshot(LOADING, ASKED), RULES)[0].state is S.STARTING


@pytest.mark.parametrize("failing", [False, True])
def test_memory_is_seen_to_come_back_before_a_stop_is_over(failing: bool) -> None:
    held = {12: GIB}
    before = at(S.STOPPING, RETURN_TIMEOUT_S - 0.1, **(FAILING if failing else {}))
    assert step(before, KNOWN, snapshot(GONE, ASKED, held), RULES) == (before, [])
    over = S.BACKOFF if failing else S.STOPPED
    assert step(before, KNOWN, snapshot(GONE, ASKED, {99: GIB}), RULES)[0].state is over
    late = replace(before, since=NOW - RETURN_TIMEOUT_S)
    assert step(late, KNOWN, snapshot(GONE, ASKED, held), RULES)[0].state is over
    assert step(late, KNOWN, snapshot(DEAD, ASKED), RULES) == (late, []), "a process that is left is waited for, however long"


@pytest.mark.parametrize(("state", "was_ready"), [(S.STARTING, False), (S.READY, True), (S.DRAINING, True)])
def test_a_mistake_in_the_spec_is_final_only_before_it_was_ready(state: State, was_ready: bool) -> None:
    stopping, _ = step(at(state), KNOWN, snapshot(MISTAKEN, SERVING), RULES)
    assert stopping.failure == Failure(stopping.reason, MISTAKEN.log_tail, NOW, was_ready)
    after, _ = step(stopping, KNOWN, snapshot(replace(MISTAKEN, gone=True), SERVING), RULES)
    assert after.state is (S.BACKOFF if was_ready else S.FAILED)
    assert ("no retry can mend this: vllm: error: unrecognized arguments" in after.reason) == (not was_ready)


def test_a_model_that_never_starts_ends_failed_after_so_many_tries() -> None:
    """The whole way round, with the worst world: an engine that is dead whenever one looks."""
    instance, delays, now = Instance("m"), list[float](), NOW
    for _ in range(200):
        world = replace(snapshot(replace(GONE, log_tail=()), ASKED), now=now)
        before = instance
        instance, _ = step(instance, KNOWN, world, RULES)
        if instance.state is S.WAITING:  # its turn comes at once
            instance = instance.to(S.STARTING, now, "its turn", launch=LAUNCH)
        if before.state is S.BACKOFF and instance.state is S.STARTING:
            delays.append(now - before.since)
        now += 0.5
    assert instance.state is S.FAILED
    assert instance.failures == MAX_FAILURES
    assert delays == [2.0, 4.0, 8.0, 16.0]


def test_who_asks_and_leaves_does_not_keep_a_broken_model_from_being_given_up() -> None:
    """Each time it has failed nobody wants it any more, and then somebody asks again."""
    instance, now, starts = Instance("m"), NOW, list[float]()
    for _ in range(400):
        traffic = NOBODY if instance.state is S.BACKOFF else ASKED
        instance, _ = step(instance, KNOWN, replace(snapshot(replace(GONE, log_tail=()), traffic), now=now), RULES)
        if instance.state is S.WAITING:
            instance = instance.to(S.STARTING, now, "its turn", launch=LAUNCH)
            starts.append(now)
        now += 0.25
    assert instance.state is S.FAILED
    assert len(starts) == MAX_FAILURES
    assert [round(later - sooner) for sooner, later in itertools.pairwise(starts)] == [2, 4, 8, 16]


def test_a_disk_that_is_full_for_a_day_gives_nobody_up() -> None:
    instance, now = Instance("m"), NOW
    for _ in range(24 * 3600):
        seen = GONE if instance.state is S.STOPPING else HINDERED
        instance, _ = step(instance, KNOWN, replace(snapshot(seen, ASKED), now=now), RULES)
        assert instance.state is not S.FAILED
        if instance.state is S.WAITING:
            instance = instance.to(S.STARTING, now, "its turn", launch=LAUNCH)
        now += 1.0
    assert instance.failures == 0


def test_bytes_of_an_engine_on_a_gpu_that_is_not_there_do_not_keep_it_stopping() -> None:
    """The launch names GPU-b, which no reading shows: nothing is held there that anyone could wait for."""
    assert step(at(S.STOPPING), KNOWN, snapshot(GONE, NOBODY), RULES)[0].state is S.STOPPED
