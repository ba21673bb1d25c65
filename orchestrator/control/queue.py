"""Who is next at one door: priority first, then the clients of one priority in turn, then first come, first served within a client.

A client's waiters of one priority and weight are a line. A line ages from when it came or was last served, and AGE_S of that count as
one level of priority: so a lower priority is never starved, and a client with many requests ages no faster than one with few.

Turns are weighted: a line of weight w is served w times as often as one of weight 1. That is self-clocked fair queueing (S. J. Golestani,
"A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994): a priority has a virtual time v, the tag of what it
served last; a line that comes or was served gets the tag F = v + 1 / w; the lowest tag is next. Of equal weights that is the order in
which they came or were served. Start tags (start-time fair queueing) would put whoever comes ahead of all who were served once: under an
endless stream of new clients those who stay would starve.

Tags and ages of one weight are in one order, that of its lines here: to choose is to compare as many lines as there are priorities and
weights. Nothing here is slower than that, however many wait.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# About one cold start (24 to 41 s on an H200): who has waited through one is a level more urgent. From the lowest priority to the
# highest it takes 8 minutes, less than the 10 that a request may wait by default (requests.max_wait).
AGE_S = 30.0


@dataclass(slots=True, eq=False)
class Place:
    """One who waits: for whom, how urgent, since when, and how often it is its turn, beside others."""

    client: str
    priority: int
    since: float
    weight: float = field(default=1.0, kw_only=True)


P = TypeVar("P", bound=Place)


@dataclass(slots=True)
class _Line(Generic[P]):
    since: float
    tag: float
    places: "OrderedDict[P, None]" = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Level(Generic[P]):
    """One priority. `served`: its virtual time."""

    served: float = 0.0
    weights: "dict[float, OrderedDict[str, _Line[P]]]" = field(default_factory=dict)  # then by client: the first is next

    def firsts(self) -> "Iterator[_Line[P]]":
        return (next(iter(lines.values())) for lines in self.weights.values())

    def next(self) -> "_Line[P]":
        return min(self.firsts(), key=lambda line: (line.tag, line.since))

    def oldest(self) -> "_Line[P]":
        return min(self.firsts(), key=lambda line: line.since)


class Queue(Generic[P]):
    def __init__(self) -> None:
        self._levels: dict[int, _Level[P]] = {}
        self._all: OrderedDict[P, None] = OrderedDict()  # as they came
        self._shares = _Shares()

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, place: P) -> bool:
        return place in self._all

    @property
    def waiting_since(self) -> float | None:
        """When the one came that waits longest."""
        return next(iter(self._all)).since if self._all else None

    def priority(self, now: float) -> int:
        """The highest that waits, with its age; 0 where nobody waits."""
        aged = (priority + int((now - level.oldest().since) // AGE_S) for priority, level in self._levels.items())
        return max(aged, default=0)

    def add(self, place: P) -> None:
        level = self._levels.setdefault(place.priority, _Level())
        lines = level.weights.setdefault(place.weight, OrderedDict())
        if place.client not in lines:
            lines[place.client] = _Line(place.since, level.served + 1 / place.weight)
        lines[place.client].places[place] = None
        self._all[place] = None
        self._shares.change(place.client, +1)

    def first(self) -> P:
        """Who is next. The queue must not be empty."""
        chosen = max(self._levels, key=lambda priority: priority * AGE_S - self._levels[priority].oldest().since)
        level = self._levels[chosen]
        # Only age can put a lower priority first: then it is its oldest's turn, or heavy lines would live on the age of a light one.
        line = level.next() if chosen == max(self._levels) else level.oldest()
        return next(iter(line.places))

    def serve(self, place: P, now: float) -> None:
        """Its turn has come: its client's others go behind those of the other clients."""
        level = self._levels[place.priority]
        level.served = level.next().tag
        self.remove(place)
        lines = level.weights.get(place.weight)
        if lines is not None and place.client in lines:
            line = lines[place.client]
            line.since, line.tag = now, level.served + 1 / place.weight
            lines.move_to_end(place.client)

    def remove(self, place: P) -> None:
        """It leaves unserved. It must be in the queue."""
        del self._all[place]
        self._shares.change(place.client, -1)
        level = self._levels[place.priority]
        lines = level.weights[place.weight]
        line = lines[place.client]
        del line.places[place]
        if not line.places:
            del lines[place.client]
            if not lines:
                del level.weights[place.weight]
                if not level.weights:
                    del self._levels[place.priority]

    def crowded_out(self, client: str) -> P | None:
        """Who leaves a full queue for one more of `client`: the least urgent and newest of the client that holds most, or None where
        `client` would then hold more than its share."""
        if not self._shares.has_room_for(client):
            return None
        most = self._shares.most()
        lines = [(priority, w[most]) for priority, level in self._levels.items() for w in level.weights.values() if most in w]
        lowest = min(priority for priority, _ in lines)
        newest = [next(reversed(line.places)) for priority, line in lines if priority == lowest]
        return max(newest, key=lambda place: place.since)


class _Shares:
    """How many places each client holds, and who holds most. A count changes by one, so the most does too."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._holders: dict[int, OrderedDict[str, None]] = {}  # those that hold so many
        self._total = self._most = 0

    def change(self, client: str, step: int) -> None:
        held = self._held.pop(client, 0)
        if held:
            del self._holders[held][client]
            if not self._holders[held]:
                del self._holders[held]
        held += step
        self._total += step
        if held:
            self._held[client] = held
            self._holders.setdefault(held, OrderedDict())[client] = None
        if held > self._most or self._most not in self._holders:
            self._most = held

    def has_room_for(self, client: str) -> bool:
        """Would it hold no more than an even share if it had one of the places that are taken?"""
        clients = len(self._held) + (client not in self._held)
        return self._held.get(client, 0) + 1 <= self._total // clients

    def most(self) -> str:
        return next(iter(self._holders[self._most]))
