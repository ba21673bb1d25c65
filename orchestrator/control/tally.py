"""Figures of a door that the loop looks at four times a second. They are kept as requests come and go, so that a look is cheap."""

import heapq
import math
from collections import Counter

AVERAGED_S = 300.0  # arrivals: long enough for a person's pauses, short enough that the morning's users do not count in the afternoon


class Largest:
    """The largest of numbers that come and go, in O(log n). Those that went are dropped when they reach the top, or outnumber the rest."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()
        self._heap: list[int] = []  # negated: heapq keeps the smallest first

    @property
    def value(self) -> int:
        """0 where there is none."""
        while self._heap and -self._heap[0] not in self._count:
            heapq.heappop(self._heap)
        return -self._heap[0] if self._heap else 0

    def add(self, number: int) -> None:
        self._count[number] += 1
        if self._count[number] == 1:
            heapq.heappush(self._heap, -number)
            if len(self._heap) > 2 * len(self._count) + 64:
                self._heap = [-known for known in self._count]
                heapq.heapify(self._heap)

    def remove(self, number: int) -> None:
        self._count[number] -= 1
        if self._count[number] <= 0:
            del self._count[number]


class Arrivals:
    """Requests a second, averaged over AVERAGED_S with the latest weighing most."""

    def __init__(self) -> None:
        self._rate = self._at = 0.0

    def add(self, now: float) -> None:
        self._rate, self._at = self.rate(now) + 1 / AVERAGED_S, now

    def rate(self, now: float) -> float:
        return self._rate * math.exp((self._at - now) / AVERAGED_S)
