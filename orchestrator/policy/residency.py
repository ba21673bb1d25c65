"""Who has to go when a model needs memory on a GPU. What caches and pools can give without anybody going is in `room` already.

Then: the cheapest idle ones sleep; the cheapest stop; one that has been busy for its whole turn is asked to finish and go; or no,
with the reason and a time. The rule that keeps it right: all or nothing. Who goes is enough on every GPU that is needed, nobody
goes in vain, and who may go at all is said in resident.py.

Cheapest is GreedyDual-Size: H = level at its last use + expected seconds to have it back / bytes that it frees and that are needed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.policy.resident import LEAST_TURN_S, Aging, How, Resident, Waiter, goes_at, loss_s, turn_s
from orchestrator.policy.units import GIB, show_bytes

Doing = dict[str, How]  # launch id -> what is done to it


@dataclass(frozen=True, slots=True)
class Victim:
    """`frees_bytes`: on each of its GPUs. `drain`: requests run; shut its door, and let it go when they are done. `takes_s`: its sleep;
    None: how long a stop takes is not known."""

    model: str
    launch_id: str
    gpus: tuple[str, ...]
    how: How
    drain: bool
    frees_bytes: int
    cost_s: float
    reason: str
    takes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Eviction:
    """Where it can go, and who leaves for it; nobody where it only waits for bytes that are on their way. Stops stand first: they
    give back host memory, and sleepers take it. Whoever carries it out claims need_bytes on `gpus`, or the next in line takes them."""

    model: str
    gpus: tuple[str, ...]
    victims: tuple[Victim, ...]
    aging: Aging

    @property
    def cost_s(self) -> float:
        return sum(victim.cost_s for victim in self.victims)

    def after(self, residents: Iterable[Resident]) -> tuple[Resident, ...]:
        """The residents as the next in line must see them: the victims are leaving, and who slept is about to wake."""
        how = {victim.launch_id: victim.how for victim in self.victims}
        return tuple(
            replace(r, leaving=how[r.launch_id])
            if r.launch_id in how
            else replace(r, arriving=True)
            if r.model == self.model and not r.leaving
            else r
            for r in residents
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """`retry_at`: when it will do if nothing else changes; None: that cannot be known. `never`: no time will do, only less foreign
    memory or fewer pins. `keep`: GPUs where nobody behind it in line may take memory, because it has waited for a whole turn."""

    reason: str
    retry_at: float | None = None
    never: bool = False
    keep: tuple[str, ...] = ()


def choose(
    waiter: Waiter,
    room: Mapping[str, int],
    residents: Sequence[Resident],
    aging: Aging,
    host_budget_bytes: int,
    now: float,
    kept: Mapping[str, str] | None = None,
    behind: Sequence[Waiter] = (),
) -> Eviction | Refusal:
    """Who has to go for `waiter`, or why nobody does.

    `room`: bytes per GPU that are free when every pool is at its least, claims taken off; negative where promises exceed what is
    there; a GPU without an entry is not used. `residents`: every engine of the box, because host memory is one for all.
    `kept`: GPU -> the model it is kept for: `keep` of those ahead in line. `behind`: those that wait in line after it. Of several
    places: one without a drain, then that with the least cost, then with the least bytes, then the first.
    """
    kept = kept or {}
    readable = [place for place in waiter.places if all(gpu in room for gpu in place)]
    places = [place for place in readable if not any(gpu in kept for gpu in place)]
    if not places:
        others = sorted({kept[gpu] for place in readable for gpu in place if gpu in kept})
        return Refusal(f"its GPU is kept for {', '.join(others)}: first in line" if others else "its GPUs cannot be read")
    lack = _lacking(waiter, {gpu: room[gpu] for place in places for gpu in place}, residents)
    for place in places:
        if not any(gpu in lack for gpu in place):
            return Eviction(waiter.model, place, (), aging)
    crowded = _crowded(waiter, behind, room, residents)
    found = []
    for index, place in enumerate(places):
        here = {gpu: lack[gpu] for gpu in place if gpu in lack}
        answer = _Choice(residents, aging, host_budget_bytes, now, waiter, here, crowded).eviction(place)
        if answer is not None:
            freed = sum(victim.frees_bytes * len(victim.gpus) for victim in answer.victims)
            found.append((any(victim.drain for victim in answer.victims), answer.cost_s, freed, index, answer))
    if found:
        return min(found, key=lambda each: each[:4])[-1]
    refusal = _refuse(waiter, places, lack, residents, now)
    return replace(refusal, never=refusal.never and len(places) == len(waiter.places))


def rather_stops(launch_id: str, residents: Sequence[Resident], budget_bytes: int, aging: Aging, now: float) -> bool:
    """Whether one that is to sleep must stop instead: the host has no room for all, and the sleepers are dearer, or it is too large."""
    choice = _Choice(residents, aging, budget_bytes, now)
    return choice.fit_host({launch_id: "sleep"}, [choice.by_id[launch_id], *choice.sleepers()])[launch_id] == "stop"


def over_host_budget(residents: Sequence[Resident], budget_bytes: int, aging: Aging, now: float) -> tuple[Victim, ...]:
    """The cheapest sleepers, to be stopped until the others fit into the host's budget. Those with requests or a pin stay."""
    choice = _Choice(residents, aging, budget_bytes, now)
    doing = choice.fit_host({}, choice.sleepers())
    return tuple(choice.victim(key, "stop", "sleepers are over the host's budget") for key in sorted(doing))


def _lacking(waiter: Waiter, room: Mapping[str, int], residents: Iterable[Resident]) -> dict[str, int]:
    """Bytes that are missing on each GPU of `room`, also when those that are leaving have gone; only where any are."""
    lack = {gpu: waiter.need_bytes - size for gpu, size in room.items()}
    for r in residents:
        for gpu in r.gpus:
            if gpu in lack:
                lack[gpu] -= r.frees(r.leaving)
    return {gpu: size for gpu, size in lack.items() if size > 0}


def _crowded(waiter: Waiter, behind: Sequence[Waiter], room: Mapping[str, int], residents: Iterable[Resident]) -> frozenset[str]:
    """GPUs where those behind in line, too, need more than sleep can give: who sleeps there is stopped for the next of them. One that
    has several places counts on each of them in part."""
    needed = dict.fromkeys(room, 0.0)
    for each in (waiter, *behind):
        for gpu in (gpu for place in each.places for gpu in place if gpu in room):
            needed[gpu] += each.need_bytes / len(each.places)
    given = dict(room)
    for r in residents:
        for gpu in (gpu for gpu in r.gpus if gpu in room and not r.pinned):
            given[gpu] += r.frees(r.leaving or "sleep")
    wanted = {gpu for each in behind for place in each.places for gpu in place}
    return frozenset(gpu for gpu in wanted & room.keys() if needed[gpu] > given[gpu])


class _Choice:
    """One choice of victims for one place. First everybody who may go stops; then, dearest first, each is spared, or only sleeps,
    where that is still enough. So nothing that is done is more than needed, and who is dearer has less done to it."""

    def __init__(
        self,
        residents: Sequence[Resident],
        aging: Aging,
        host_budget: int,
        now: float,
        waiter: Waiter | None = None,
        lack: Mapping[str, int] | None = None,
        crowded: frozenset[str] = frozenset(),
    ) -> None:
        self.by_id = {r.launch_id: r for r in residents}
        self.aging, self.host_budget, self.now, self.waiter, self.lack = aging, host_budget, now, waiter, lack or {}
        self.crowded = crowded

    def eviction(self, place: tuple[str, ...]) -> Eviction | None:
        waiter, by_id = self.waiter, self.by_id
        assert waiter is not None
        here = [r for r in by_id.values() if not r.arriving and self.lack.keys() & set(r.gpus)]
        doing: Doing = {r.launch_id: "stop" for r in here if goes_at(r, waiter, self.now) <= self.now}
        if not self.enough(doing):
            return None
        host_free = self.host_budget - self.host_bytes({})
        asleep: dict[str, How | None] = {
            r.launch_id: "sleep" if self.may_sleep(r) and r.on_host("sleep") - r.on_host(None) <= host_free else None for r in here
        }
        doing = self.ease(doing, {key: None for key in doing if by_id[key].busy}, self.enough)
        doing = self.ease(doing, {key: asleep[key] for key in doing}, self.enough)
        doing = self.ease(doing, {key: None for key, how in doing.items() if how == "sleep"}, self.enough)
        doing = self.fit_host(doing, [by_id[key] for key, how in doing.items() if how == "sleep"])
        while (less := self.trade(self.ease(doing, dict.fromkeys(doing), self.fits))) != doing:  # it ends: spared is spared
            doing = less
        stops_first = sorted(doing, key=lambda key: (doing[key] == "sleep", self.price(key, doing[key]), key))
        victims = tuple(self.victim(key, doing[key], f"makes room for {waiter.model}") for key in stops_first)
        level = max((self.aging.level, *(self.price(key, how) for key, how in doing.items())))
        return Eviction(waiter.model, place, victims, replace(self.aging, level=level))

    def may_sleep(self, r: Resident) -> bool:
        return r.gains_by_sleep and self.crowded.isdisjoint(r.gpus)

    def price(self, key: str, how: How) -> float:
        """H. Bytes beyond what lacks are worth nothing, and the last GiB of it counts whole: a tiny lack must not lift the level."""
        r = self.by_id[key]
        useful = sum(min(r.frees(how), max(size, GIB)) for gpu, size in self.lack.items() if gpu in r.gpus)
        return self.aging.of(key) + loss_s(r, how, self.now) * GIB / max(1, useful or r.host_bytes)

    def enough(self, doing: Doing) -> bool:
        freed = dict.fromkeys(self.lack, 0)
        for key, how in doing.items():
            for gpu in self.by_id[key].gpus:
                if gpu in freed:
                    freed[gpu] += self.by_id[key].frees(how)
        return all(freed[gpu] >= size for gpu, size in self.lack.items())

    def host_bytes(self, doing: Doing) -> int:
        return sum(r.on_host(doing.get(r.launch_id)) for r in self.by_id.values())

    def fits(self, doing: Doing) -> bool:
        return self.enough(doing) and ("sleep" not in doing.values() or self.host_bytes(doing) <= self.host_budget)

    def ease(self, doing: Doing, lesser: Mapping[str, How | None], ok: Callable[[Doing], bool]) -> Doing:
        for key in sorted(lesser, key=lambda key: (doing[key] == "sleep", self.price(key, doing[key]), key), reverse=True):
            less = _instead(doing, key, lesser[key])
            doing = less if ok(less) else doing
        return doing

    def fit_host(self, before: Doing, stoppable: Iterable[Resident]) -> Doing:
        """The cheapest of `stoppable`, which all sleep or are to sleep, stop until the sleepers fit: host memory is a cache as well."""
        room = self.host_budget - self.host_bytes(before)
        if room >= 0:
            return before

        def price(r: Resident) -> tuple[float, str]:
            return (self.aging.of(r.launch_id) + loss_s(r, "stop", self.now) * GIB / max(1, r.host_bytes), r.launch_id)

        dearest_first = sorted(stoppable, key=price, reverse=True)
        doing = before | dict.fromkeys((r.launch_id for r in dearest_first), "stop")
        room += sum(r.on_host("sleep") for r in dearest_first)
        for r in dearest_first:
            if r.on_host("sleep") <= room:
                room -= r.on_host("sleep")
                doing = _instead(doing, r.launch_id, before.get(r.launch_id))
        return doing

    def trade(self, doing: Doing) -> Doing:
        """Who stops for lack of host memory sleeps instead, where sleepers whose loss is smaller can stop for it."""
        could_sleep = [key for key, how in doing.items() if how == "stop" and self.may_sleep(self.by_id[key])]
        for key in sorted(could_sleep, key=lambda key: (self.price(key, "stop"), key), reverse=True):
            less = self.fit_host(_instead(doing, key, "sleep"), [r for r in self.sleepers() if r.launch_id not in doing])
            gain = loss_s(self.by_id[key], "stop", self.now) - loss_s(self.by_id[key], "sleep", self.now)
            loss = sum(loss_s(self.by_id[other], "stop", self.now) for other in less.keys() - doing.keys())
            doing = less if self.fits(less) and loss <= max(0.0, gain) else doing
        return doing

    def sleepers(self) -> list[Resident]:
        """Those that may leave the host."""
        own = self.waiter.model if self.waiter else None
        return [r for r in self.by_id.values() if r.asleep and r.model != own and not (r.busy or r.pinned or r.arriving or r.leaving)]

    def victim(self, key: str, how: How, why: str) -> Victim:
        r, drain = self.by_id[key], self.by_id[key].busy and not self.by_id[key].asleep
        state = "asleep" if r.asleep else f"idle for {self.now - r.last_used:.0f}s"
        state = f"its turn is over after {self.now - r.since:.0f}s" if drain else state
        takes_s = r.sleep_s if how == "sleep" else None
        return Victim(r.model, key, r.gpus, how, drain, r.frees(how), loss_s(r, how, self.now), f"{why}: {state}", takes_s)


def _instead(doing: Doing, key: str, how: How | None) -> Doing:
    others = {other: done for other, done in doing.items() if other != key}
    return others if how is None else others | {key: how}


def _refuse(
    waiter: Waiter, places: Sequence[tuple[str, ...]], lack: Mapping[str, int], residents: Sequence[Resident], now: float
) -> Refusal:
    """The place that will do the soonest, when, and who stands in the way there."""

    def enough_at(gpu: str, size: int) -> float:
        for at, held in sorted((goes_at(r, waiter, now), r.held_bytes) for r in residents if gpu in r.gpus):
            if (size := size - held) <= 0:
                return at
        return math.inf

    free_at = {gpu: enough_at(gpu, size) for gpu, size in lack.items()}
    place = min(places, key=lambda place: max(free_at.get(gpu, now) for gpu in place))
    at = max(now, *(free_at.get(gpu, now) for gpu in place))
    here = {gpu: lack[gpu] for gpu in place if gpu in lack}
    blocking = sorted((r for r in residents if here.keys() & set(r.gpus) and not r.leaving), key=lambda r: (r.model, r.launch_id))
    why = "; ".join(f"{r.model} {_stays(r, waiter, now)}" for r in blocking) or "no engine of ours holds them"
    reason = f"{show_bytes(max(here.values()))} are missing: {why}"
    if at == math.inf:
        return Refusal(reason, never=True)
    patience = max((turn_s(r, waiter) for r in blocking if not r.pinned), default=LEAST_TURN_S)
    return Refusal(reason, retry_at=at, keep=place if now >= waiter.since + patience else ())


def _stays(r: Resident, waiter: Waiter, now: float) -> str:
    if r.model == waiter.model or goes_at(r, waiter, now) <= now:
        return "is not enough"
    if r.pinned:
        return "is pinned"
    if r.arriving:
        return "is just coming"
    return "has requests" if r.busy else f"came less than {r.min_residency_s:.0f}s ago"
