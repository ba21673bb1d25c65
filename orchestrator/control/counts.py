"""What has happened since the daemon started, counted: requests, waits, moves of models, moves of limits, looks of the loop.

Only additions to plain lists and dicts: a part of it is on the way of each request. What is shown of it, and how it is called there, is
api/metrics.py's. Labels come from what is registered and from our own words, never from a client, so they are as many as those. What was
counted of a model is forgotten with it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.control.keys import Usage
from orchestrator.policy.actions import Action, SetLimit
from orchestrator.policy.instance import Instance, State

# Upper bounds of buckets, in seconds. Of answers: from a cached embedding to a long stream behind a cold start.
ANSWER_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LOOK_S = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # of a decision: one interval is 0.25
LEFT = 499  # the status of a request whose client left before the end of its answer, as nginx calls it


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
    def __init__(self) -> None:
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
        if status < 400:
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
        if before is None:
            return
        match before.state, after.state:
            case State.STARTING, State.READY if not adopted:
                found.starts.add(after.since - before.since)
            case State.WAKING, State.READY:
                found.wakes.add(after.since - before.since)
            case State.DRAINING, State.ASLEEP:
                found.sleeps.add(after.since - (before.since if before.sent_at is None else before.sent_at))

    def acted(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, SetLimit):
                moves = self.of(action.model).limit_moves
                moves[action.reason] = moves.get(action.reason, 0) + 1
