"""What eviction must know of one engine that holds memory: what it gives back, what its return costs, and when it may go.

The rule that keeps it right: nobody goes who is pinned, runs requests, or came less than its minimum residency ago. And so that
two models that fight for one GPU take turns: one that is busy all the time is asked to finish once it has been there, and the
other has waited, for a turn. Turns are shared by weight: a level of priority doubles the time, up to 16 : 1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

HORIZON_S = 60.0  # "used again soon": use repeats over a minute, hardly from day to day (traces in arXiv 2505.04021)
LEAST_REUSE = 0.01  # so that among models that nobody uses, the one that comes back soonest goes first
TURN = 4.0  # minimum residencies
MOST_LEVELS = 4  # of priority that lengthen or shorten a turn: by half of their weight, as the other's turn changes by the other half
LEAST_TURN_S = 30.0
LEVEL_S = 30.0  # a level of priority is worth this much waiting: who waits long enough is first in line

How = Literal["sleep", "stop"]


@dataclass(frozen=True, slots=True)
class Resident:
    """One engine that holds memory. Bytes are per GPU, the same on each of `gpus`; times are the loop's clock, in seconds.

    held_bytes: what comes back if it stops, besides what `room` counts of its pool already: weights, contexts, promised KV.
    sleep_frees_bytes: what of that comes back if it sleeps; 0 where it can not. host_bytes: host memory that it takes asleep.
    since: when it was ready, after its start or its last wake; for one that is arriving (starts, wakes) when that is expected.
    leaving: it is on its way to that, also while it drains: its bytes are coming. busy: requests run, or wait for it.
    """

    model: str
    launch_id: str
    gpus: tuple[str, ...]
    held_bytes: int
    sleep_frees_bytes: int
    host_bytes: int
    since: float
    min_residency_s: float
    last_used: float
    arrivals: float  # requests a second, averaged
    wake_s: float  # to have it back from sleep
    start_s: float  # to have it back from nothing
    priority: int = 0
    asleep: bool = False
    arriving: bool = False
    leaving: How | None = None
    busy: bool = False
    pinned: bool = False

    def frees(self, how: How | None) -> int:
        if how == "stop":
            return self.held_bytes
        return self.sleep_frees_bytes if how == "sleep" and not self.asleep else 0

    def ends_as(self, how: How | None) -> How | None:
        """How it is once `how`, or else what is under way, is done."""
        return how or self.leaving or ("sleep" if self.asleep else None)


@dataclass(frozen=True, slots=True)
class Waiter:
    """A model that needs `need_bytes` on each GPU of one of `places`, the preferred first, and has waited for it since `since`.

    For one that sleeps, `places` is where it sleeps, and `need_bytes` what its sleep freed.
    """

    model: str
    need_bytes: int
    places: tuple[tuple[str, ...], ...]
    since: float
    priority: int = 0

    @property
    def turn(self) -> float:
        """The lowest is first in line. It does not change while somebody waits, so nobody is passed for ever."""
        return self.since - LEVEL_S * self.priority


@dataclass(frozen=True, slots=True)
class Aging:
    """What must be remembered between looks, by whoever remembers the plan: GreedyDual's level, and what it was at each last use.

    `seen()` once a look, before anything is chosen; an eviction that is carried out has the next one.
    """

    level: float = 0.0
    used: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # launch id -> (last_used, level then)

    def seen(self, residents: Iterable[Resident]) -> "Aging":
        used = {}
        for r in residents:
            known = self.used.get(r.launch_id)
            used[r.launch_id] = known if known and known[0] == r.last_used and not r.busy else (r.last_used, self.level)
        return Aging(self.level, used)

    def of(self, launch_id: str) -> float:
        return self.used.get(launch_id, (0.0, self.level))[1]


def goes_at(r: Resident, waiter: Waiter, now: float) -> float:
    """From when on it may go for `waiter`, if it stays as busy or idle as it is; inf: never."""
    if r.pinned or r.leaving or r.model == waiter.model:
        return math.inf
    came = max(r.since, now) if r.arriving else -math.inf if r.asleep else r.since
    return max(came, waiter.since) + turn_s(r, waiter) if r.busy else came + r.min_residency_s


def turn_s(r: Resident, waiter: Waiter) -> float:
    """How long a busy one stays at least, and `waiter` waits at least, before it is asked to finish."""
    levels = min(MOST_LEVELS, max(-MOST_LEVELS, r.priority - waiter.priority))
    return float(max(LEAST_TURN_S, TURN * r.min_residency_s * 2.0 ** (levels / 2)))


def loss_s(r: Resident, how: How, now: float) -> float:
    """Seconds that users are expected to wait for its return, weighted by its priority."""
    idle_s = now - r.last_used
    rate = min(r.arrivals, 1 / idle_s) if idle_s > 0 else r.arrivals  # a long gap says more than an average of better days
    again = 1.0 if r.busy else max(LEAST_REUSE, 1 - math.exp(-rate * HORIZON_S))
    return float(2.0**r.priority * again * (r.wake_s if how == "sleep" else r.start_s))
