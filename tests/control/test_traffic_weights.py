"""Turns by weight: each line's share is its weight's, nobody starves for being light, and a flood costs others little, in services."""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.queue import AGE_S, Place, Queue

pure = settings(derandomize=True, deadline=None)
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 8.0])


def place(client: str, weight: float = 1.0, priority: int = 0, since: float = 0.0) -> Place:
    return Place(client, priority, since, weight=weight)


def serve(queue: Queue[Place], now: float = 0.0) -> Place:
    served = queue.first()
    queue.serve(served, now)
    return served


# ---- the rule, computed the slow way ------------------------------------------------------------------------------------------


class Slow:
    """A virtual time of each priority; a tag of each line of weight w, 1 / w after what was served last when it came or was served."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, float, str], list[Place]] = {}
        self.tags: dict[tuple[int, float, str], Fraction] = {}
        self.since: dict[tuple[int, float, str], float] = {}
        self.served: dict[int, Fraction] = {}

    def enter(self, line: tuple[int, float, str], now: float) -> None:
        self.tags[line] = self.served.setdefault(line[0], Fraction(0)) + 1 / Fraction(line[1])
        self.since[line] = now

    def add(self, new: Place) -> None:
        line = (new.priority, new.weight, new.client)
        if line not in self.lines:
            self.enter(line, new.since)
        self.lines.setdefault(line, []).append(new)

    def remove(self, gone: Place) -> None:
        line = (gone.priority, gone.weight, gone.client)
        self.lines[line].remove(gone)
        if not self.lines[line]:
            del self.lines[line]
        if not any(priority == gone.priority for priority, _, _ in self.lines):
            self.served.pop(gone.priority, None)

    def first(self) -> Place:
        oldest = max(self.lines, key=lambda line: line[0] * AGE_S - self.since[line])
        top = max(self.lines)[0]
        if oldest[0] == top:
            oldest = min((line for line in self.lines if line[0] == top), key=lambda line: (self.tags[line], self.since[line]))
        return self.lines[oldest][0]

    def serve(self, gone: Place, now: float) -> None:
        line = (gone.priority, gone.weight, gone.client)
        served = min(tag for other, tag in self.tags.items() if other in self.lines and other[0] == gone.priority)
        self.remove(gone)
        if gone.priority in self.served:
            self.served[gone.priority] = served
        if line in self.lines:
            self.enter(line, now)


CLIENTS = st.sampled_from([("a", 1.0), ("b", 0.25), ("c", 2.0), ("d", 8.0), ("e", 2.0), ("a", 4.0)])
STEPS = st.one_of(
    st.tuples(st.just("comes"), CLIENTS, st.integers(-1, 1)),
    st.tuples(st.just("served"), st.sampled_from([0.0, 4.0, AGE_S]), st.none()),
    st.tuples(st.just("leaves"), st.integers(0, 99), st.none()),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(STEPS, max_size=80))
def test_who_is_next_is_who_the_rule_says(steps: list[tuple[str, object, int | None]]) -> None:
    queue, slow, there, now = Queue[Place](), Slow(), list[Place](), 1000.0
    for what, which, priority in steps:
        now += 0.125  # no two are alike: the rule alone decides. Weights are powers of two: sums of their inverses are exact
        if what == "comes":
            assert isinstance(which, tuple)
            assert priority is not None
            new = place(which[0], which[1], priority, now)
            queue.add(new)
            slow.add(new)
            there.append(new)
        elif there and what == "served":
            assert isinstance(which, float)
            now += which
            next_one = queue.first()
            assert next_one is slow.first()
            queue.serve(next_one, now)
            slow.serve(next_one, now)
            there.remove(next_one)
        elif there and what == "leaves":
            assert isinstance(which, int)
            gone = there.pop(which % len(there))
            queue.remove(gone)
            slow.remove(gone)


# ---- what follows from it -----------------------------------------------------------------------------------------------------


@pure
@given(weights=st.lists(WEIGHTS, min_size=2, max_size=6), before=st.integers(0, 40), services=st.integers(1, 300))
def test_of_lines_that_always_wait_each_is_served_by_its_weight(weights: list[float], before: int, services: int) -> None:
    """In any stretch of services, to within one turn of each: Golestani's bound."""
    queue = Queue[Place]()
    for client, weight in enumerate(weights):
        queue.add(place(str(client), weight))
    served: Counter[str] = Counter()
    for number in range(before + services):
        one = serve(queue)
        queue.add(place(one.client, one.weight))
        served[one.client] += number >= before
    shares = [served[str(client)] / weight for client, weight in enumerate(weights)]
    for a, b in itertools.combinations(range(len(weights)), 2):
        assert abs(shares[a] - shares[b]) <= 1 / weights[a] + 1 / weights[b] + 1e-9


@pure
@given(weight=WEIGHTS, others=st.lists(WEIGHTS, min_size=1, max_size=5), before=st.integers(0, 60))
def test_who_comes_waits_for_no_more_than_the_others_share_of_a_turn(weight: float, others: list[float], before: int) -> None:
    queue = Queue[Place]()
    for client, heavy in enumerate(others):
        queue.add(place(f"flood {client}", heavy))
    for number in range(before):
        one = serve(queue, float(number))
        queue.add(place(one.client, one.weight, since=float(number)))
    late = place("late", weight, since=float(before))
    queue.add(late)
    ahead: Counter[str] = Counter()
    while (one := serve(queue, float(before))) is not late:
        queue.add(place(one.client, one.weight, since=float(before)))
        ahead[one.client] += 1
    for client, heavy in enumerate(others):
        assert ahead[f"flood {client}"] <= math.floor(heavy / weight + 1e-9) + 1


def test_an_endless_stream_of_new_clients_does_not_starve_one_who_stays() -> None:
    queue = Queue[Place]()
    for number in range(2):
        queue.add(place("stays"))
        queue.add(place(f"new {number}"))
    served = []
    for number in range(2, 40):
        served.append(serve(queue).client)
        queue.add(place(f"new {number}"))
        queue.add(place("stays"))
    assert served.count("stays") >= 3


@pure
@given(weight=WEIGHTS, heavy=WEIGHTS, levels=st.integers(1, 4))
def test_age_is_served_before_weight(weight: float, heavy: float, levels: int) -> None:
    """A lower priority that has waited long enough gives the turn to who waited, not to the heaviest there."""
    queue, now = Queue[Place](), 0.0
    queue.add(place("light", weight))
    queue.add(place("urgent", 1.0, levels))
    while (one := serve(queue, now)).client != "light":
        now += 1.0
        queue.add(place(one.client, one.weight, one.priority, now))
        queue.add(place("heavy", heavy, since=now))
        assert now <= levels * AGE_S + 2
    assert now >= levels * AGE_S - 1


def test_a_full_queue_puts_out_the_newest_of_a_client_whatever_its_weights() -> None:
    queue = Queue[Place]()
    for since, weight in enumerate((1.0, 4.0, 1.0, 2.0)):
        queue.add(place("much", weight, since=float(since)))
    out = queue.crowded_out("other")
    assert out is not None
    assert (out.since, out.weight) == (3.0, 2.0)


# ---- a flood ------------------------------------------------------------------------------------------------------------------

SERVICE_S = 1.0
SLOTS = 4
KEYS, AT_ONCE, THINK_S = 8, 3, 1.0
FLOOD = "flood"


class Fifo(Queue[Place]):
    """First come, first served: what the test of a flood must not pass with."""

    def first(self) -> Place:
        return next(iter(self._all))

    def serve(self, place: Place, now: float) -> None:
        self.remove(place)


def waits(queue: Queue[Place], seed: int, flood: int, weight: float = 1.0, seconds: float = 500.0) -> dict[str, list[float]]:
    """How long each request waited, by client. KEYS clients have AT_ONCE requests each, and think for THINK_S or so between an answer and
    the next; the flood has as many as it is told, always. There are SLOTS places, a request takes SERVICE_S; the clock is ours."""
    rng, found = random.Random(seed), dict[str, list[float]]()
    coming = [(rng.expovariate(1 / THINK_S), number, f"key {number % KEYS}") for number in range(KEYS * AT_ONCE)]
    coming += [(0.0, -number, FLOOD) for number in range(1, flood + 1)]
    heapq.heapify(coming)
    running, number = list[tuple[float, str]](), len(coming)
    now = 0.0
    while now < seconds:
        now = min(coming[0][0] if coming else math.inf, running[0][0] if running else math.inf)
        while running and running[0][0] <= now:
            client, number = heapq.heappop(running)[1], number + 1
            think = 0.0 if client == FLOOD else rng.expovariate(1 / THINK_S)
            heapq.heappush(coming, (now + think, number, client))
        while coming and coming[0][0] <= now:
            client = heapq.heappop(coming)[2]
            queue.add(place(client, weight if client == FLOOD else 1.0, since=now))
        while queue and len(running) < SLOTS:
            one = serve(queue, now)
            found.setdefault(one.client, []).append(now - one.since)
            heapq.heappush(running, (now + SERVICE_S, one.client))
    return found


def p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def worst(found: dict[str, list[float]]) -> float:
    """Of the p99 waits of those that do not flood."""
    return max(p99(waited) for client, waited in found.items() if client != FLOOD)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_flooding_key_raises_no_others_p99_wait_by_more_than_half(seed: int, weight: float) -> None:
    alone, beside = worst(waits(Queue(), seed, 0)), worst(waits(Queue(), seed, 400, weight))
    assert alone > SERVICE_S
    assert beside <= 1.5 * alone
    assert worst(waits(Fifo(), seed, 400)) > 10 * alone  # so the load is one in which that takes something
