"""Who is next at one door: priority first, then the clients of one priority in turn, then first come, first served within a client.

A client's waiters of one priority are a line. A line ages from when it came or was last served, and AGE_S of that count as one
level of priority: so a lower priority is never starved, and a client with many requests ages no faster than one with few. Served
lines go behind the others, so the first of each priority is also the one that waits longest, and to choose is to compare as
many lines as there are priorities. Nothing here is slower than that, however many wait.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# About one cold start (24 to 41 s on an H200): who has waited through one is a level more urgent. From the lowest priority to the
# highest it takes 8 minutes, less than the 10 that a request may wait by default (requests.max_wait).
AGE_S = 30.0


@dataclass(slots=True, eq=False)
class Place:
    """One who waits: for whom, how urgent, since when."""

    client: str
    priority: int
    since: float


P = TypeVar("P", bound=Place)


@dataclass(slots=True)
class _Line(Generic[P]):
    since: float
    places: "OrderedDict[P, None]" = field(default_factory=OrderedDict)


class Queue(Generic[P]):
    def __init__(self) -> None:
        self._lines: dict[int, OrderedDict[str, _Line[P]]] = {}  # by priority, then by client: the first is next
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
        aged = (priority + int((now - _first(lines).since) // AGE_S) for priority, lines in self._lines.items())
        return max(aged, default=0)

    def add(self, place: P) -> None:
        lines = self._lines.setdefault(place.priority, OrderedDict())
        if place.client not in lines:
            lines[place.client] = _Line(place.since)
        lines[place.client].places[place] = None
        self._all[place] = None
        self._shares.change(place.client, +1)

    def first(self) -> P:
        """Who is next. The queue must not be empty."""
        chosen = max(self._lines, key=lambda priority: priority * AGE_S - _first(self._lines[priority]).since)
        return next(iter(_first(self._lines[chosen]).places))

    def serve(self, place: P, now: float) -> None:
        """Its turn has come: its client's others go behind those of the other clients."""
        self.remove(place)
        lines = self._lines.get(place.priority)
        if lines is not None and place.client in lines:
            lines[place.client].since = now
            lines.move_to_end(place.client)

    def remove(self, place: P) -> None:
        """It leaves unserved. It must be in the queue."""
        del self._all[place]
        self._shares.change(place.client, -1)
        lines = self._lines[place.priority]
        line = lines[place.client]
        del line.places[place]
        if not line.places:
            del lines[place.client]
            if not lines:
                del self._lines[place.priority]

    def crowded_out(self, client: str) -> P | None:
        """Who leaves a full queue for one more of `client`: the least urgent and newest of the client that holds most, or None where
        `client` would then hold more than its share."""
        if not self._shares.has_room_for(client):
            return None
        most = self._shares.most()
        lowest = min(priority for priority, lines in self._lines.items() if most in lines)
        return next(reversed(self._lines[lowest][most].places))


def _first(lines: "OrderedDict[str, _Line[P]]") -> _Line[P]:
    return next(iter(lines.values()))


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
