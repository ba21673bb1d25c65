"""Who is next, and the figures that are kept beside: held against what they mean, computed the slow way over everything there is."""

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.control.queue import AGE_S, Place, Queue
from orchestrator.control.tally import AVERAGED_S, Arrivals, Largest

pure = settings(derandomize=True, deadline=None)


@dataclass
class Slow:
    """The rule in a few lines: nothing is kept but who waits and when each line was last served."""

    waiting: list[Place] = field(default_factory=list)
    served: dict[tuple[str, int], float] = field(default_factory=dict)
    came: dict[tuple[str, int], float] = field(default_factory=dict)

    def line(self, place: Place) -> tuple[str, int]:
        return place.client, place.priority

    def since(self, place: Place) -> float:
        """A line ages from when it came or was last served."""
        line = self.line(place)
        return max(self.came[line], self.served.get(line, -math.inf))

    def add(self, place: Place) -> None:
        if not any(self.line(other) == self.line(place) for other in self.waiting):
            self.came[self.line(place)] = place.since
        self.waiting.append(place)

    def worth(self, place: Place, now: float) -> float:
        return place.priority + (now - self.since(place)) / AGE_S


class AnyQueue(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue, self.slow, self.now = Queue[Place](), Slow(), 1000.0

    @rule(seconds=st.sampled_from([0.5, 7.0, AGE_S, 4 * AGE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(client=st.sampled_from("abc"), priority=st.integers(-2, 2))
    def comes(self, client: str, priority: int) -> None:
        self.now += 0.125  # so that no two are alike, and the rule alone decides
        place = Place(client, priority, self.now)
        self.queue.add(place)
        self.slow.add(place)

    @precondition(lambda self: self.slow.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.slow.waiting))
        self.queue.remove(place)
        self.slow.waiting.remove(place)
        assert place not in self.queue

    @precondition(lambda self: self.slow.waiting)
    @rule()
    def is_served(self) -> None:
        self.now += 0.125
        place = self.queue.first()
        worths = {self.slow.line(other): self.slow.worth(other, self.now) for other in self.slow.waiting}
        assert worths[self.slow.line(place)] == max(worths.values())
        assert place is next(other for other in self.slow.waiting if self.slow.line(other) == self.slow.line(place))
        self.queue.serve(place, self.now)
        self.slow.waiting.remove(place)
        self.slow.served[self.slow.line(place)] = self.now

    @precondition(lambda self: self.slow.waiting)
    @rule(client=st.sampled_from("abcd"))
    def would_crowd_out(self, client: str) -> None:
        held = {name: sum(place.client == name for place in self.slow.waiting) for name in "abcd"}
        share = len(self.slow.waiting) // len({place.client for place in self.slow.waiting} | {client})
        out = self.queue.crowded_out(client)
        if held[client] + 1 > share:
            assert out is None
            return
        assert out is not None
        assert held[out.client] == max(held.values())
        assert held[out.client] >= held[client] + 2  # so that neither has cause to take the place back
        theirs = [place for place in self.slow.waiting if place.client == out.client]
        assert out is [place for place in theirs if place.priority == min(p.priority for p in theirs)][-1]

    @invariant()
    def figures_are_those_of_who_waits(self) -> None:
        assert len(self.queue) == len(self.slow.waiting)
        assert self.queue.waiting_since == min((place.since for place in self.slow.waiting), default=None)
        worths = [place.priority + int((self.now - self.slow.since(place)) // AGE_S) for place in self.slow.waiting]
        assert self.queue.priority(self.now) == max(worths, default=0)


AnyQueue.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
TestAnyQueue = AnyQueue.TestCase


@pure
@given(floods=st.lists(st.integers(1, 40), min_size=1, max_size=5), before=st.integers(0, 40))
def test_nobody_waits_for_more_than_one_of_each_other_client(floods: list[int], before: int) -> None:
    queue, now = Queue[Place](), 0.0
    for client, count in enumerate(floods):
        for _ in range(count):
            queue.add(Place(f"flood {client}", 0, now))
    for _ in range(min(before, sum(floods))):  # they have been served for a while when the one comes, and aged
        now += 1.0
        queue.serve(queue.first(), now)
    now += 10 * AGE_S
    late = Place("late", 0, now)
    queue.add(late)
    ahead = 0
    while (served := queue.first()) is not late:
        queue.serve(served, now)
        ahead += 1
    assert ahead <= len(floods)


@pure
@given(low=st.integers(-8, 8), high=st.integers(-8, 8), others=st.integers(1, 4), each_s=st.sampled_from([0.5, 3.0, 20.0]))
def test_no_priority_starves_whatever_comes(low: int, high: int, others: int, each_s: float) -> None:
    """As many as are served come anew, all of a higher priority."""
    low, high = sorted((low, high))
    queue, now = Queue[Place](), 0.0
    patient = Place("patient", low, now)
    queue.add(patient)
    for n in range(others):
        queue.add(Place(f"other {n}", high, now))
    while (served := queue.first()) is not patient:
        now += each_s
        queue.serve(served, now)
        queue.add(Place(served.client, high, now))
        assert now <= (high - low) * AGE_S + (others + 1) * each_s
    assert queue.priority(now) == max(high, low + int(now // AGE_S))


def test_a_flood_does_not_age_faster_than_a_single_request() -> None:
    """A hundred that wait for minutes are one line: the next one of it is ahead of a higher priority, the rest are not."""
    queue = Queue[Place]()
    for _ in range(100):
        queue.add(Place("flood", 0, 0.0))
    queue.add(Place("urgent", 1, 3 * AGE_S))
    served = []
    for _ in range(3):
        served.append(queue.first().client)
        queue.serve(queue.first(), 3 * AGE_S)
    assert served == ["flood", "urgent", "flood"]


@pure
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=300))
def test_the_largest_of_numbers_that_come_and_go(steps: list[tuple[bool, int]]) -> None:
    largest, there = Largest(), list[int]()
    for comes, number in steps:
        if comes:
            largest.add(number)
            there.append(number)
        elif number in there:
            largest.remove(number)
            there.remove(number)
        assert largest.value == max(there, default=0)


def test_what_went_is_forgotten_even_under_a_large_one_that_stays() -> None:
    largest = Largest()
    largest.add(10**9)
    for number in range(10_000):
        largest.add(number)
        largest.remove(number)
    assert largest.value == 10**9
    assert len(largest._heap) < 100


def test_arrivals_settle_at_their_rate_and_fade_when_nobody_comes() -> None:
    arrivals, now = Arrivals(), 0.0
    assert arrivals.rate(now) == 0
    while now < 10 * AVERAGED_S:
        now += 0.5
        arrivals.add(now)
    assert math.isclose(arrivals.rate(now), 2.0, rel_tol=0.01)
    assert math.isclose(arrivals.rate(now + AVERAGED_S), 2.0 / math.e, rel_tol=0.01)
    assert arrivals.rate(now + 1e6) == 0
