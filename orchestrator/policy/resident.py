"""What eviction must know of one engine that holds memory: what it gives back, what its return costs, and when it may go.

The rule that keeps it right: nobody goes who is pinned, runs requests, or came less than its minimum residency ago. And so that
two models that fight for one GPU take turns: one that is busy all the time is asked to finish once it has been there, and the
other has waited, for a turn. Turns are shared by weight: a level of priority doubles the time, up to 16 : 1.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.policy.division import Pool
from orchestrator.policy.footprint import Footprint
from orchestrator.policy.instance import Instance, State, Then
from orchestrator.policy.lifecycle import NEVER, Known, can_sleep
from orchestrator.policy.snapshot import EngineSeen, Snapshot, TrafficSeen

HORIZON_S = 60.0  # "used again soon": use repeats over a minute, hardly from day to day (traces in arXiv 2505.04021)
LEAST_REUSE = 0.01  # so that among models that nobody uses, the one that comes back soonest goes first
TURN = 4.0  # minimum residencies
MOST_LEVELS = 4  # of priority that lengthen or shorten a turn: by half of their weight, as the other's turn changes by the other half
LEAST_TURN_S = 30.0
START_S = 30.0  # where a model has not shown how long it takes
LEVEL_S = 30.0  # a level of priority is worth this much waiting: who waits long enough is first in line

How = Literal["sleep", "stop"]


@dataclass(frozen=True, slots=True)
class Resident:
    """One engine that holds memory. Bytes are per GPU, the same on each of `gpus`; times are the loop's clock, in seconds.

    held_bytes: what comes back if it stops, besides what `room` counts of its pool already: weights, contexts, promised KV.
    sleep_frees_bytes: what of that comes back if it sleeps; 0 where it can not. host_bytes: host memory that it takes asleep.
    host_held_bytes: what it has of that already, asleep or awake: an engine that has slept keeps it to its end.
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
    sleep_s: float  # until it sleeps: an engine's first time is the longest, because it pins host memory
    wake_s: float  # to have it back from sleep
    start_s: float  # to have it back from nothing
    host_held_bytes: int = 0
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

    @property
    def gains_by_sleep(self) -> bool:
        """Its users wait less than for a stop and a start."""
        return self.frees("sleep") > 0 and self.sleep_s + self.wake_s <= self.start_s

    def ends_as(self, how: How | None) -> How | None:
        """How it is once `how`, or else what is under way, is done."""
        return how or self.leaving or ("sleep" if self.asleep else None)

    def on_host(self, how: How | None) -> int:
        """Host memory that it holds then."""
        end = self.ends_as(how)
        return 0 if end == "stop" else max(self.host_bytes, self.host_held_bytes) if end == "sleep" else self.host_held_bytes


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
    """Seconds that users are expected to wait for its going and its return, weighted by its priority."""
    idle_s = now - r.last_used
    rate = min(r.arrivals, 1 / idle_s) if idle_s > 0 else r.arrivals  # a long gap says more than an average of better days
    again = 1.0 if r.busy else max(LEAST_REUSE, 1 - math.exp(-rate * HORIZON_S))
    return float(2.0**r.priority * again * (r.sleep_s + r.wake_s if how == "sleep" else r.start_s))


def resident_of(instance: Instance, model: Known | None, pools: Mapping[str, Pool], snapshot: Snapshot) -> Resident | None:
    """What is seen of it and known of its model; None where it has no engine. `pools`: by launch id."""
    launch = instance.launch
    if launch is None or instance.state is State.WAITING:
        return None
    spec, footprint = (model.spec, model.footprint) if model else (launch.spec, Footprint("unknown"))
    seen, traffic = snapshot.engines.get(launch.id), snapshot.traffic.get(instance.model, TrafficSeen())
    mapped = seen.segment.mapped_bytes if seen and seen.segment else 0
    pool = pools.get(launch.id)
    least, bundle = (pool.least, pool.bundle_bytes) if pool else (0, 0)
    shown = min((snapshot.held_bytes(launch.id, gpu) for gpu in launch.gpus), default=0)
    state, stopping = instance.state, instance.state is State.STOPPING
    asleep, arriving = state is State.ASLEEP, state in (State.STARTING, State.WAKING)
    fixed = max(0, shown - mapped) if shown else footprint.asleep_bytes if asleep else footprint.ready_bytes
    leaving: How | None = None
    if stopping or state is State.DRAINING:
        leaving = "sleep" if instance.then is Then.SLEEP else "stop"
    sleeps = can_sleep(spec, instance) and launch.spec.sleep_level > 0 and not asleep and not stopping
    pinned_bytes = seen.host_bytes if seen and not seen.gone else 0
    expected = (footprint.start_s or START_S) if state is State.STARTING else footprint.wake_s
    used = max(traffic.last_used if traffic.last_used is not None else NEVER, model.started_at if model else NEVER)
    return Resident(
        model=instance.model,
        launch_id=launch.id,
        gpus=launch.gpus,
        held_bytes=shown if stopping else fixed + least,
        sleep_frees_bytes=max(0, fixed - footprint.asleep_bytes + max(0, least - bundle)) if sleeps else 0,
        host_bytes=pinned_bytes or footprint.host_bytes,
        host_held_bytes=pinned_bytes or (footprint.host_bytes if asleep or instance.sent_at is not None else 0),
        since=max(snapshot.now, instance.since + expected) if arriving else instance.ready_since or instance.since,
        min_residency_s=spec.min_residency,
        last_used=used if used > NEVER else instance.since,
        arrivals=traffic.arrivals,
        sleep_s=footprint.sleep_again_s if has_slept(seen) else footprint.sleep_s,
        wake_s=footprint.wake_s,
        start_s=footprint.start_s or START_S,
        priority=spec.priority,
        asleep=asleep,
        arriving=arriving,
        leaving=leaving,
        busy=traffic.in_flight + traffic.waiting > 0,
        pinned=spec.pinned,
    )


def has_slept(seen: EngineSeen | None) -> bool:
    """What its first sleep pins on the host it keeps to its end, and its later sleeps are quick."""
    return seen is not None and seen.host_bytes > 0
