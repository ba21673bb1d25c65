"""Requests at the doors of their models: who runs, who waits. The loop opens and shuts doors; a lease always comes back.

Everything here is synchronous between awaits, on one event loop: checking a door and counting a request are one step, so
the count can not be stranded by a client that leaves at the wrong moment.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from orchestrator.errors import ModelNotFound, OrchestratorError, QueueFull, WaitTimeout
from orchestrator.policy.snapshot import TrafficSeen


@dataclass(frozen=True, slots=True)
class Door:
    """How requests for one model fare now. `launch_id`: where to; None: they wait, or get `error` at once."""

    launch_id: str | None = None
    error: OrchestratorError | None = None
    retry_after_s: float = 5.0
    max_concurrency: int = 256
    max_queue: int = 512


@dataclass(slots=True)
class _Model:
    door: Door
    in_flight: int = 0
    waiters: deque[asyncio.Future[str]] = field(default_factory=deque)
    last_used: float | None = None


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

    def seen(self) -> dict[str, TrafficSeen]:
        return {name: TrafficSeen(m.in_flight, len(m.waiters), m.last_used) for name, m in self._models.items()}

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[str]:
        """Hold a place at `name` and get the launch id to send to. Waits while the model is not ready or full.

        Raises ModelNotFound, ModelUnavailable, QueueFull, or WaitTimeout after max_wait_s.
        """
        model, launch_id = await self._enter(name)  # this object until the lease ends, also if the model is removed meanwhile
        try:
            yield launch_id
        finally:
            model.in_flight -= 1
            model.last_used = self._clock()
            self._grant(model)
            if model.in_flight == 0:
                self._wake()  # a draining model may end now

    async def _enter(self, name: str) -> tuple[_Model, str]:
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(f"The model {name!r} does not exist.", param="model")
        door = model.door
        if door.error is not None:
            raise door.error
        if door.launch_id is not None and model.in_flight < door.max_concurrency and not model.waiters:
            model.in_flight += 1
            model.last_used = self._clock()
            return model, door.launch_id
        if len(model.waiters) >= door.max_queue:
            raise QueueFull(
                f"{len(model.waiters)} requests wait for {name!r} already (max_queue): try again later.", retry_after_s=door.retry_after_s
            )
        turn: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        model.waiters.append(turn)
        self._wake()
        try:
            async with asyncio.timeout(self._max_wait_s):
                return model, await turn
        except TimeoutError:
            self._leave(model, turn)
            raise WaitTimeout(
                f"{name!r} was not ready within {self._max_wait_s:.0f}s (requests.max_wait).", retry_after_s=door.retry_after_s
            ) from None
        except BaseException:
            self._leave(model, turn)
            raise

    def _leave(self, model: _Model, turn: "asyncio.Future[str]") -> None:
        """A waiter goes. If its turn came in the same instant, the place that it was given goes to the next."""
        if turn in model.waiters:
            model.waiters.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            model.in_flight -= 1
            self._grant(model)

    def _grant(self, model: _Model) -> None:
        door = model.door
        while door.launch_id is not None and model.waiters and model.in_flight < door.max_concurrency:
            turn = model.waiters.popleft()
            if not turn.done():
                model.in_flight += 1
                model.last_used = self._clock()
                turn.set_result(door.launch_id)

    def _refuse(self, model: _Model, error: OrchestratorError) -> None:
        while model.waiters:
            turn = model.waiters.popleft()
            if not turn.done():
                turn.set_exception(error)
