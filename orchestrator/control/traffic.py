"""Requests at the doors of their models: who runs, who waits. The loop opens and shuts doors; a lease always comes back.

Everything here is synchronous between awaits, on one event loop: checking a door and counting a request are one step, so
the count can not be stranded by a client that leaves at the wrong moment.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from orchestrator.errors import ModelNotFound, OrchestratorError, QueueFull, WaitTimeout
from orchestrator.policy.snapshot import TrafficSeen

ROOM_S = 0.5  # a limit is in force 0.15 s after the loop has seen the need, where there is memory


@dataclass(frozen=True, slots=True)
class Door:
    """How requests for one model fare now. `launch_id`: where to; None: they wait, or get `error` at once.

    `fitting_tokens`: the longest request that its engine's limit lets run to the end; None: all that its model takes.
    """

    launch_id: str | None = None
    error: OrchestratorError | None = None
    retry_after_s: float = 5.0
    max_concurrency: int = 256
    max_queue: int = 512
    fitting_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request may need, in tokens: `most` bounds prompt and answer together, `first` what its engine must have room for
    before it begins, `likely` is a guess of the whole."""

    most: int = 0
    first: int = 0
    likely: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[str]
    ask: Ask


@dataclass(slots=True)
class _Model:
    door: Door
    running: Counter[int] = field(default_factory=Counter)  # bounds of the requests in flight
    in_flight: int = 0
    waiters: deque[_Waiter] = field(default_factory=deque)
    lookers: list[asyncio.Future[None]] = field(default_factory=list)  # wait for the next word of the loop
    last_used: float | None = None

    def seen(self) -> TrafficSeen:
        largest = max((*self.running, *(waiter.ask.most for waiter in self.waiters)), default=0)
        return TrafficSeen(self.in_flight, len(self.waiters), self.last_used, largest, sum(w.ask.likely for w in self.waiters))

    def enter(self, ask: Ask, now: float) -> None:
        self.in_flight += 1
        self.running[ask.most] += 1
        self.last_used = now

    def leave(self, ask: Ask) -> None:
        self.in_flight -= 1
        self.running[ask.most] -= 1
        if self.running[ask.most] <= 0:
            del self.running[ask.most]


class Traffic:
    def __init__(self, wake: Callable[[], None], max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wake, self._max_wait_s, self._clock = wake, max_wait_s, clock
        self._models: dict[str, _Model] = {}

    def publish(self, doors: Mapping[str, Door]) -> None:
        """The loop's word on every model; called after limits were written."""
        for name in self._models.keys() - doors.keys():
            model = self._models.pop(name)
            self._refuse(model, ModelNotFound(f"The model {name!r} was removed.", param="model"))
        for name, door in doors.items():
            model = self._models.setdefault(name, _Model(door))
            model.door = door
            if door.error is not None:
                self._refuse(model, door.error)
            self._grant(model)
            while model.lookers:
                looker = model.lookers.pop()
                if not looker.done():
                    looker.set_result(None)

    def seen(self) -> dict[str, TrafficSeen]:
        return {name: model.seen() for name, model in self._models.items()}

    @asynccontextmanager
    async def lease(self, name: str, ask: Ask = Ask()) -> AsyncIterator[str]:
        """Hold a place at `name` and get the launch id to send to. Waits while the model is not ready or full, and shortly while
        its limit is raised for a request that does not fit.

        Raises ModelNotFound, ModelUnavailable, QueueFull, or WaitTimeout after max_wait_s.
        """
        model, launch_id = await self._enter(name, ask)  # this object until the lease ends, also if the model is removed meanwhile
        try:
            await self._make_room(model, ask)
            yield launch_id
        finally:
            model.leave(ask)
            model.last_used = self._clock()
            self._grant(model)
            if model.in_flight == 0:
                self._wake()  # a draining model may end now

    async def _make_room(self, model: _Model, ask: Ask) -> None:
        """An idle engine whose limit is under what its first request needs would be stuck. This one counts as running already, so
        the loop sees its need: let it raise the limit first. After ROOM_S, or in company, the request goes on all the same."""
        try:
            async with asyncio.timeout(ROOM_S):
                while model.in_flight == 1 and model.door.fitting_tokens is not None and ask.first > model.door.fitting_tokens:
                    looker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    model.lookers.append(looker)
                    self._wake()
                    await looker
        except TimeoutError:
            pass

    async def _enter(self, name: str, ask: Ask) -> tuple[_Model, str]:
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        door = model.door
        if door.error is not None:
            raise door.error
        if door.launch_id is not None and model.in_flight < door.max_concurrency and not model.waiters:
            model.enter(ask, self._clock())
            return model, door.launch_id
        if len(model.waiters) >= door.max_queue:
            raise QueueFull(
                f"{len(model.waiters)} requests wait for {name!r} already (max_queue): try again later.", retry_after_s=door.retry_after_s
            )
        turn: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(turn, ask)
        model.waiters.append(waiter)
        self._wake()
        try:
            async with asyncio.timeout(self._max_wait_s):
                return model, await turn
        except TimeoutError:
            self._leave(model, waiter)
            raise WaitTimeout(
                f"{name!r} was not ready within {self._max_wait_s:.0f}s (requests.max_wait).", retry_after_s=door.retry_after_s
            ) from None
        except BaseException:
            self._leave(model, waiter)
            raise

    def _leave(self, model: _Model, waiter: _Waiter) -> None:
        """A waiter goes. If its turn came in the same instant, the place that it was given goes to the next."""
        if waiter in model.waiters:
            model.waiters.remove(waiter)
        elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            model.leave(waiter.ask)
            self._grant(model)

    def _grant(self, model: _Model) -> None:
        door = model.door
        while door.launch_id is not None and model.waiters and model.in_flight < door.max_concurrency:
            waiter = model.waiters.popleft()
            if not waiter.turn.done():
                model.enter(waiter.ask, self._clock())
                waiter.turn.set_result(door.launch_id)

    def _refuse(self, model: _Model, error: OrchestratorError) -> None:
        while model.waiters:
            waiter = model.waiters.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(error)
