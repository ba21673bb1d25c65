"""Requests of many clients at one door, and what they are told while they wait."""

import asyncio
import itertools
from collections.abc import Sequence

from orchestrator.control.traffic import Ask, Asker, Door, Tell, Traffic
from tests.control.fakes import Clock
from tests.control.world import NOTHING, Request
from tests.support.eventually import turns

NOBODY = Asker()
TURNS = itertools.count()  # orders the turns that were given


class Visit(Request):
    """A request of somebody. `heard`: what it was told, if it wants to be. `turn`: smaller than that of those served later."""

    turn: int

    def __init__(self, traffic: Traffic, model: str, ask: Ask = NOTHING, asker: Asker = NOBODY, tell: Tell | bool = False) -> None:
        self.asker, self.heard = asker, list[Door]()
        self._tell = (self.hear if tell else None) if isinstance(tell, bool) else tell
        super().__init__(traffic, model, ask)

    async def hear(self, door: Door) -> None:
        self.heard.append(door)

    async def _run(self, traffic: Traffic, model: str) -> None:
        async with traffic.lease(model, self.ask, self.asker, self._tell) as self.launch_id:
            self.turn = next(TURNS)
            await self._end.wait()


class Hall:
    """The door of model `a`, and all who came."""

    def __init__(self, max_wait_s: float = 60.0, max_queue: int = 4096) -> None:
        self.wakes, self.clock = 0, Clock()
        self.traffic = Traffic(self._wake, max_wait_s, self.clock, max_queue)
        self.visits: list[Visit] = []

    def _wake(self) -> None:
        self.wakes += 1

    async def door(self, launch_id: str | None = "one", **fields: object) -> None:
        self.traffic.publish({"a": Door(launch_id, **fields)})  # type: ignore[arg-type]
        await turns()

    async def come(
        self, client: str = "", priority: int = 0, patience_s: float | None = None, tell: Tell | bool = False, model: str = "a"
    ) -> Visit:
        self.visits.append(Visit(self.traffic, model, asker=Asker(client, priority, patience_s), tell=tell))
        await turns()
        return self.visits[-1]

    def counts(self) -> tuple[int, int]:
        seen = self.traffic.seen()["a"]
        return seen.in_flight, seen.waiting

    async def served(self, seconds: float = 0.0) -> list[Visit]:
        """Serve one after the other until nobody waits or runs, each for `seconds`; those whose turn came, in order."""
        order: list[Visit] = []
        while running := [visit for visit in self.visits if visit.launch_id and not visit.task.done()]:
            order += running
            for visit in running:
                self.clock.now += seconds
                await visit.finish()
                await turns()
        return order

    async def all_leave(self) -> None:
        for visit in self.visits:
            visit.task.cancel()
        await asyncio.gather(*(visit.task for visit in self.visits), return_exceptions=True)


def clients(visits: Sequence[Visit]) -> str:
    return " ".join(visit.asker.client for visit in visits)
