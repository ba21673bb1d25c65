"""What has happened since the daemon started, counted: requests, waits, moves of models, moves of limits, looks of the loop.

Only additions to plain lists and dicts: a part of it is on the way of each request. What is shown of it, and how it is called there, is
api/metrics.py's. Labels come from what is registered and from our own words, never from a client, so they are as many as those. What was
counted of a model is forgotten with it.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.control.keys import Usage
from orchestrator.policy.actions import Action, SetLimit
from orchestrator.policy.instance import Instance, State

# Upper bounds of buckets, in seconds. Of answers: from a cached embedding to a long stream behind a cold start.
ANSWER_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LOOK_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # of a decision: one interval is 0.25
UPGRADED = 101  # of a WebSocket, whose seconds are no answer's
LEFT = 499  # the status of a request whose client left before the end of its answer, as nginx calls it


class Move(NamedTuple):
    """What a model was brought into: a start, a sleep or a wake, from `began` to `ended` (time.monotonic's). `failed`: why it came to
    nothing."""

    model: str
    kind: str
    began: float
    ended: float
    why: str
    failed: str = ""


class Spread:
    """A histogram. `counts`: of each bucket by itself, and in the last place those above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class Took:
    """How often something was done, and the seconds of all times together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelCounts:
    """Of one model; of "": of requests that named none that there is."""

    statuses: dict[int, int] = field(default_factory=dict)  # of requests, as they ended
    errors: dict[str, int] = field(default_factory=dict)  # of ours among them, by code
    answers: Spread = field(default_factory=lambda: Spread(ANSWER_S))  # from the request to the end of its answer, where that is no error
    firsts: Spread = field(default_factory=lambda: Spread(ANSWER_S))  # from the request to the first event of its stream
    waits: Spread = field(default_factory=lambda: Spread(ANSWER_S))  # of those that waited for their turn and got it
    prompt_tokens: int = 0
    completion_tokens: int = 0
    states: dict[str, int] = field(default_factory=dict)  # how often it came into each
    failures: int = 0
    starts: Took = field(default_factory=Took)
    sleeps: Took = field(default_factory=Took)
    wakes: Took = field(default_factory=Took)
    limit_moves: dict[str, int] = field(default_factory=dict)  # by reason


class Counts:
    """`tell`: who hears of each move of a model, besides."""

    def __init__(self, tell: Callable[[Move], None] | None = None) -> None:
        self._tell = tell
        self.models: dict[str, ModelCounts] = {}
        self.looks = Spread(LOOK_S)
        self.loop_errors = 0

    def of(self, model: str) -> ModelCounts:
        found = self.models.get(model)
        if found is None:
            found = self.models[model] = ModelCounts()
        return found

    def forget(self, model: str) -> None:
        self.models.pop(model, None)

    # ---- requests -----------------------------------------------------------------------------------------------------

    def answered(
        self, model: str, status: int, took_s: float, first_s: float | None = None, usage: Usage | None = None, code: str | None = None
    ) -> None:
        """A request has ended, in whatever way: `status` is what became of it, LEFT among others, and `code` that of our own error."""
        found = self.models.get(model) or self.of(model)
        statuses = found.statuses
        statuses[status] = statuses.get(status, 0) + 1
        if UPGRADED < status < 400:
            spread = found.answers
            spread.counts[bisect_left(ANSWER_S, took_s)] += 1
            spread.sum += took_s
        if first_s is not None:
            found.firsts.add(first_s)
        if usage is not None:
            found.prompt_tokens += usage.prompt_tokens
            found.completion_tokens += usage.completion_tokens
        if code is not None:
            found.errors[code] = found.errors.get(code, 0) + 1

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def moved(self, before: Instance | None, after: Instance, adopted: bool) -> None:
        """A model came into another state. `adopted`: its engine was found running, so how long it took was not seen."""
        found = self.of(after.model)
        found.states[after.state] = found.states.get(after.state, 0) + 1
        if after.state is State.STOPPING and after.failing:
            found.failures += 1
        move = None if before is None else _move(before, after, adopted)
        if move is None:
            return
        if not move.failed:
            {"start": found.starts, "wake": found.wakes, "sleep": found.sleeps}[move.kind].add(move.ended - move.began)
        if self._tell is not None:
            self._tell(move)

    def acted(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, SetLimit):
                moves = self.of(action.model).limit_moves
                moves[action.reason] = moves.get(action.reason, 0) + 1


def _move(before: Instance, after: Instance, adopted: bool) -> Move | None:
    failed = after.reason if after.failing else ""
    began, kind = before.since, ""
    match before.state, after.state:
        case (State.STARTING, State.READY) if not adopted:
            kind = "start"
        case (State.WAKING, State.READY):
            kind = "wake"
        case (State.DRAINING, State.ASLEEP):
            kind, began = "sleep", before.since if before.sent_at is None else before.sent_at
        case (State.STARTING, State.STOPPING) if failed and not adopted:
            kind = "start"
        case (State.WAKING, State.STOPPING) if failed:
            kind = "wake"
    return Move(after.model, kind, began, after.since, before.reason, failed) if kind else None
