"""Requests at the doors of their models: who runs, who waits. The loop opens and shuts doors; a lease always comes back.

Everything here is synchronous between awaits, on one event loop: checking a door and counting a request are one step, so
the count can not be stranded by a client that leaves at the wrong moment. Who of those that wait is next: see queue.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from orchestrator.control.counts import Counts
from orchestrator.control.queue import Place, Queue
from orchestrator.control.tally import Arrivals, Largest
from orchestrator.errors import ModelNotFound, NotInTime, OrchestratorError, QueueFull, WaitTimeout
from orchestrator.policy.snapshot import TrafficSeen

ROOM_S = 0.5  # a limit is in force 0.15 s after the loop has seen the need, where there is memory
TELL_S = 5.0  # who wants to be told hears something this often: nginx cuts an answer after 60 s of silence, people sooner


@dataclass(frozen=True, slots=True)
class Door:
    """How requests for one model fare now. `launch_id`: where to; None: they wait, or get `error` at once.

    `retry_after_s`: how long it will take until it is open. `fitting_tokens`: the longest request that its engine's limit lets run
    to the end; None: all that its model takes. `phase`: what is being done for those who wait, in words. `timed`: retry_after_s is
    what the model has shown, not a guess.
    """

    launch_id: str | None = None
    error: OrchestratorError | None = None
    retry_after_s: float = 5.0
    max_concurrency: int = 256
    max_queue: int = 512
    fitting_tokens: int | None = None
    phase: str = ""
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request may need, in tokens: `most` bounds prompt and answer together, `first` what its engine must have room for
    before it begins, `likely` is a guess of the whole."""

    most: int = 0
    first: int = 0
    likely: int = 0


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and how. Clients of one `priority` (the highest is served first) are served in turn. `patience_s`: how long it
    waits by its own word; None: as long as we let it. `weight`: how many turns its client has where others have one."""

    client: str = ""
    priority: int = 0
    patience_s: float | None = None
    weight: float = 1.0


Tell = Callable[[Door], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Waiter(Place):
    turn: asyncio.Future[str]
    ask: Ask
    news: asyncio.Event | None = None  # set when there is something to tell


@dataclass(slots=True, eq=False)
class _Model:
    name: str
    door: Door
    in_flight: int = 0
    queue: Queue[_Waiter] = field(default_factory=Queue)
    told: set[_Waiter] = field(default_factory=set)
    lookers: list[asyncio.Future[None]] = field(default_factory=list)  # wait for the next word of the loop
    last_used: float | None = None
    bounds: Largest = field(default_factory=Largest)  # of those that run or wait
    waiting_tokens: int = 0
    arrivals: Arrivals = field(default_factory=Arrivals)

    def seen(self, now: float) -> TrafficSeen:
        return TrafficSeen(
            in_flight=self.in_flight,
            waiting=len(self.queue),
            last_used=self.last_used,
            largest_tokens=self.bounds.value,
            waiting_tokens=self.waiting_tokens,
            waiting_since=self.queue.waiting_since,
            priority=self.queue.priority(now),
            arrivals=self.arrivals.rate(now),
        )

    @property
    def room(self) -> str | None:
        """The launch that takes one more request now."""
        return self.door.launch_id if self.in_flight < self.door.max_concurrency else None

    def is_stuck_with(self, ask: Ask) -> bool:
        """An idle engine whose limit is under what its first request needs would not begin it."""
        return self.in_flight == 1 and self.door.fitting_tokens is not None and ask.first > self.door.fitting_tokens

    def enter(self, ask: Ask, now: float) -> None:
        self.in_flight += 1
        self.bounds.add(ask.most)
        self.last_used = now

    def leave(self, ask: Ask) -> None:
        self.in_flight -= 1
        self.bounds.remove(ask.most)


class Traffic:
    """`max_wait_s`: how long a request may wait; `max_queue`: how many may, at all doors together (each has its own bound too)."""

    def __init__(
        self,
        wake: Callable[[], None],
        max_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        max_queue: int = 4096,
        counts: Counts | None = None,
    ) -> None:
        self._wake, self._max_wait_s, self._clock, self._max_queue = wake, max_wait_s, clock, max_queue
        self._counts = counts or Counts()
        self._models: dict[str, _Model] = {}
        self._waiting = 0

    def heed(self, max_wait_s: float, max_queue: int) -> None:
        """For who comes from now on."""
        self._max_wait_s, self._max_queue = max_wait_s, max_queue

    def publish(self, doors: Mapping[str, Door]) -> None:
        """The loop's word on every model; called after limits were written."""
        for name in self._models.keys() - doors.keys():
            model = self._models.pop(name)
            self._refuse(model, ModelNotFound(f"The model {name!r} was removed.", param="model"))
        for name, door in doors.items():
            model = self._models.setdefault(name, _Model(name, door))
            before, model.door = model.door, door
            if door.error is not None:
                self._refuse(model, door.error)
            self._grant(model)
            if (door.phase, door.launch_id) != (before.phase, before.launch_id):
                for waiter in model.told:
                    _has_news(waiter)
            while model.lookers:
                looker = model.lookers.pop()
                if not looker.done():
                    looker.set_result(None)

    def seen(self) -> dict[str, TrafficSeen]:
        now = self._clock()
        return {name: model.seen(now) for name, model in self._models.items()}

    def lease(self, name: str, ask: Ask = Ask(), asker: Asker = Asker(), tell: Tell | None = None) -> "Lease":
        """Hold a place at `name` and get the launch id to send to. Waits while the model is not ready or full, and shortly while
        its limit is raised for a request that does not fit. `tell` hears of the door while it waits: at once, when its phase
        changes, and every TELL_S. Where nothing is told, the request did not wait.

        Raises ModelNotFound, ModelUnavailable, QueueFull, NotInTime if it would wait in vain, or WaitTimeout.
        """
        return Lease(self, name, ask, asker, tell)

    def takes(self, name: str, ask: Ask) -> bool:
        """Whether take() would give a place now."""
        model = self._models.get(name)
        return (
            model is not None
            and model.door.error is None
            and not model.queue
            and model.room is not None
            and (model.in_flight > 0 or model.door.fitting_tokens is None or ask.first <= model.door.fitting_tokens)
        )

    def take(self, name: str, ask: Ask) -> tuple[str, float, Callable[[], float]]:
        """A place where takes() said that there is one, without a wait: the launch id to send to, since when it is held, and what gives it
        back, once, and says when that was."""
        model, now = self._models[name], self._clock()
        launch_id = model.room
        assert launch_id is not None
        model.arrivals.add(now)
        model.enter(ask, now)
        return launch_id, now, partial(self._give_back, model, ask)

    def _give_back(self, model: _Model, ask: Ask) -> float:
        model.leave(ask)
        model.last_used = now = self._clock()
        self._grant(model)
        if model.in_flight == 0 and (model.door.launch_id is None or self._waiting):
            self._wake()  # a draining model may end now, or one whose room somebody waits for
        return now

    async def _make_room(self, model: _Model, ask: Ask) -> None:
        """This one counts as running already, so the loop sees its need: let it raise the limit first. After ROOM_S, or in company,
        the request goes on all the same."""
        try:
            async with asyncio.timeout(ROOM_S):
                while model.is_stuck_with(ask):
                    looker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    model.lookers.append(looker)
                    self._wake()
                    await looker
        except TimeoutError:
            pass

    async def _enter(self, name: str, ask: Ask, asker: Asker, tell: Tell | None) -> tuple[_Model, str]:
        model, now = self._models.get(name), self._clock()
        if model is None:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        door = model.door
        if door.error is not None:
            raise door.error
        model.arrivals.add(now)
        if (launch_id := model.room) is not None and not model.queue:
            model.enter(ask, now)
            return model, launch_id
        patience_s, whose = self._max_wait_s, "requests.max_wait"
        if asker.patience_s is not None and asker.patience_s < patience_s:
            patience_s, whose = asker.patience_s, "its own timeout"
        if door.launch_id is None and door.timed and door.retry_after_s > patience_s:
            self._expect_back(model)
            raise NotInTime(
                f"{name!r} will be ready in about {door.retry_after_s:.0f}s, and this request waits {patience_s:.0f}s ({whose}): come"
                " back then, it is being started.",
                retry_after_s=door.retry_after_s,
            )
        if len(model.queue) >= door.max_queue or self._waiting >= self._max_queue:
            self._make_place(model, asker.client)
        waiter = self._queue(model, ask, asker, now)
        self._wake()
        try:
            async with asyncio.timeout(patience_s):
                if tell is not None:
                    await self._keep_telling(model, waiter, tell)
                return model, await waiter.turn
        except TimeoutError:
            self._leave(model, waiter)
            self._expect_back(model)
            raise WaitTimeout(
                f"{name!r} was not ready within {patience_s:.0f}s ({whose}).", retry_after_s=model.door.retry_after_s
            ) from None
        except BaseException:
            self._leave(model, waiter)
            raise

    async def _keep_telling(self, model: _Model, waiter: _Waiter, tell: Tell) -> None:
        """Until its turn. What happens while it is told something is told next."""
        waiter.news = asyncio.Event()
        waiter.turn.add_done_callback(lambda turn: _has_news(waiter))
        model.told.add(waiter)
        try:
            while not waiter.turn.done():
                waiter.news.clear()
                await tell(model.door)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TELL_S):
                        await waiter.news.wait()
        finally:
            model.told.discard(waiter)

    def _expect_back(self, model: _Model) -> None:
        """Somebody was told when to come back: until then the model counts as asked for, or it would never be started."""
        model.last_used = self._clock()
        self._wake()

    def _make_place(self, model: _Model, client: str) -> None:
        """In a full queue a client that has less than its share gets a place of the one that has most. Raises QueueFull for others."""
        waiting, bound = f"{len(model.queue)} requests wait for {model.name!r}", "max_queue"
        if len(model.queue) < model.door.max_queue:
            waiting, bound = f"{self._waiting} requests wait for their models", "requests.max_queue"
        full = QueueFull(f"{waiting} already ({bound}): try again later.", retry_after_s=model.door.retry_after_s)
        out = model.queue.crowded_out(client)
        if out is None:
            raise full
        self._unqueue(model, out)
        if not out.turn.done():
            out.turn.set_exception(full)

    def _queue(self, model: _Model, ask: Ask, asker: Asker, now: float) -> _Waiter:
        turn = asyncio.get_running_loop().create_future()
        waiter = _Waiter(asker.client, asker.priority, now, turn, ask, weight=asker.weight)
        model.queue.add(waiter)
        model.bounds.add(ask.most)
        model.waiting_tokens += ask.likely
        self._waiting += 1
        return waiter

    def _unqueue(self, model: _Model, waiter: _Waiter, served_at: float | None = None) -> None:
        if served_at is None:
            model.queue.remove(waiter)
        else:
            model.queue.serve(waiter, served_at)
        model.bounds.remove(waiter.ask.most)
        model.waiting_tokens -= waiter.ask.likely
        self._waiting -= 1

    def _leave(self, model: _Model, waiter: _Waiter) -> None:
        """A waiter goes. If its turn came in the same instant, the place that it was given goes to the next."""
        if waiter in model.queue:
            self._unqueue(model, waiter)
        elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
            model.leave(waiter.ask)
            self._grant(model)

    def _grant(self, model: _Model) -> None:
        while model.queue and (launch_id := model.room) is not None:
            waiter, now = model.queue.first(), self._clock()
            if waiter.turn.done():  # it leaves in this very instant
                self._unqueue(model, waiter)
                continue
            self._unqueue(model, waiter, served_at=now)
            model.enter(waiter.ask, now)
            self._counts.of(model.name).waits.add(now - waiter.since)
            waiter.turn.set_result(launch_id)

    def _refuse(self, model: _Model, error: OrchestratorError) -> None:
        while model.queue:
            waiter = model.queue.first()
            self._unqueue(model, waiter)
            if not waiter.turn.done():
                waiter.turn.set_exception(error)


class Lease:
    """`async with`: one request's hold on an instance, from when it may run to the end of the block, however that ends."""

    __slots__ = ("_ask", "_asker", "_model", "_name", "_tell", "_traffic")

    def __init__(self, traffic: Traffic, name: str, ask: Ask, asker: Asker, tell: Tell | None) -> None:
        self._traffic, self._name, self._ask, self._asker, self._tell = traffic, name, ask, asker, tell

    async def __aenter__(self) -> str:
        # The model's object is kept to the end, also if the model is removed meanwhile.
        self._model, launch_id = await self._traffic._enter(self._name, self._ask, self._asker, self._tell)
        if self._model.is_stuck_with(self._ask):
            try:
                await self._traffic._make_room(self._model, self._ask)
            except BaseException:
                self._traffic._give_back(self._model, self._ask)
                raise
        return launch_id

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self._traffic._give_back(self._model, self._ask)


def _has_news(waiter: _Waiter) -> None:
    if waiter.news is not None:
        waiter.news.set()
