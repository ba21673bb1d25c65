"""What we know of one model's engine. `NEXT` is the whole state diagram; `Instance.to()` is the only way to move in it."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from orchestrator.policy.model import ModelSpec


class State(StrEnum):
    STOPPED = "stopped"  # no engine, and nobody wants one
    WAITING = "waiting"  # wanted; memory or its turn is missing
    STARTING = "starting"  # spawned; not yet ready
    READY = "ready"  # answers requests
    ASLEEP = "asleep"  # weights in host memory
    WAKING = "waking"  # coming back from sleep
    DRAINING = "draining"  # takes no new requests, finishes those it has
    STOPPING = "stopping"  # its processes are being ended, its memory is coming back
    BACKOFF = "backoff"  # failed; will be tried again
    FAILED = "failed"  # failed too often; an operator must act


class Then(StrEnum):
    """What becomes of an engine once it has finished its requests."""

    STOP = "stop"
    SLEEP = "sleep"


S = State
NEXT: dict[State, frozenset[State]] = {
    S.STOPPED: frozenset({S.WAITING}),
    S.WAITING: frozenset({S.STARTING, S.STOPPED}),
    S.STARTING: frozenset({S.READY, S.STOPPING, S.ASLEEP}),  # asleep: one that the last daemon put to sleep
    S.READY: frozenset({S.DRAINING, S.STOPPING}),
    S.ASLEEP: frozenset({S.WAKING, S.STOPPING}),
    S.WAKING: frozenset({S.READY, S.STOPPING}),
    S.DRAINING: frozenset({S.READY, S.STOPPING, S.ASLEEP}),
    S.STOPPING: frozenset({S.STOPPED, S.BACKOFF, S.FAILED}),
    S.BACKOFF: frozenset({S.WAITING, S.STOPPED}),
    S.FAILED: frozenset({S.WAITING, S.STOPPED}),
}
HAS_ENGINE = frozenset({S.STARTING, S.READY, S.ASLEEP, S.WAKING, S.DRAINING, S.STOPPING})


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of one engine. Its id is never used again, so what an old launch left behind can not be taken for a new one's.

    Bytes are per GPU: `claim_bytes` what it may take besides KV while it starts, `floor_bytes` the KV it is promised meanwhile,
    `ceiling_bytes` the segment's start-up total, above which no limit may ever be.
    """

    id: str
    ipc_name: str
    spec: ModelSpec
    gpus: tuple[str, ...]
    claim_bytes: int
    floor_bytes: int
    ceiling_bytes: int
    expected_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    reason: str
    log: tuple[str, ...]
    at: float
    was_ready: bool  # it had served: then its last words are no proof of a mistake in the spec
    hindered: bool = False  # the daemon could not start it: not counted, and tried until it can


@dataclass(frozen=True, slots=True)
class Instance:
    model: str
    state: State = State.STOPPED
    since: float = 0.0
    reason: str = "never started"
    launch: Launch | None = None
    reserved: bool = False  # WAITING, ASLEEP: its memory is promised and others make room
    peak_bytes: int = 0  # most that NVML showed on one of its GPUs while it started, less its KV
    ready_since: float = 0.0  # when it last became READY
    then: Then = Then.STOP  # DRAINING: what follows
    yielded_at: float | None = None  # since then it makes room for another, or was drained: only new demand brings it back
    sent_at: float | None = None  # DRAINING: when it was told to sleep
    held_bytes: int = 0  # DRAINING: what NVML showed on one of its GPUs when it was told so
    slept: bool = False  # DRAINING: its engine had slept before it was told so
    failing: bool = False  # STOPPING because of a failure: BACKOFF or FAILED follows
    failures: int = 0  # in a row
    failure: Failure | None = None  # the last one, kept until a run has been stable
    retry_at: float = 0.0  # BACKOFF: when it is tried again; WAITING, ASLEEP: when somebody else will have been there long enough to go

    def to(self, state: State, now: float, reason: str, **changes: Any) -> "Instance":
        """Move. Raises ValueError for a move that NEXT does not have: that is a bug, never a condition."""
        if state not in NEXT[self.state]:
            raise ValueError(f"{self.model}: no move from {self.state} to {state} ({reason})")
        if state not in HAS_ENGINE:
            changes.setdefault("launch", None)
        if state is State.READY:
            changes |= {"ready_since": now}
        if state is not State.DRAINING:
            changes |= {"then": Then.STOP, "sent_at": None, "held_bytes": 0, "slept": False}
        if state in (State.WAITING, State.STARTING, State.WAKING, State.READY):
            changes |= {"yielded_at": None}
        return replace(self, state=state, since=now, reason=reason, **changes)
