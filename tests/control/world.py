"""A small world around one loop: ticks are made by hand, so nothing here waits for time.

Each `World.tick` is: time passes, every engine does one step, the loop looks and acts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from orchestrator.control.observe import Observer
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry
from orchestrator.control.traffic import Ask, Door, Traffic
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.model import ModelSpec
from tests.control.fakes import Clock, FakeEngines, FakeGpus, FakeSources, FakeStore, spec
from tests.support.eventually import turns

NOTHING = Ask()


class WatchedTraffic(Traffic):
    """Notes in the journal when a door opens, so that it can be told what came before."""

    def __init__(self, journal: list[str], clock: Clock) -> None:
        super().__init__(self._woken, max_wait_s=60.0, clock=clock)
        self._journal, self._open = journal, set[str]()
        self.doors: Mapping[str, Door] = {}
        self.wakes = 0

    def _woken(self) -> None:
        self.wakes += 1

    def publish(self, doors: Mapping[str, Door]) -> None:
        now_open = {name for name, door in doors.items() if door.launch_id is not None}
        self._journal.extend(f"open {name}" for name in sorted(now_open - self._open))
        self._open, self.doors = now_open, doors
        super().publish(doors)


class Request:
    """One user's request: waits for its lease, holds it until `finish`."""

    def __init__(self, traffic: Traffic, model: str, ask: Ask = NOTHING) -> None:
        self._end, self.ask = asyncio.Event(), ask
        self.launch_id: str | None = None
        self.task = asyncio.ensure_future(self._run(traffic, model))

    async def _run(self, traffic: Traffic, model: str) -> None:
        async with traffic.lease(model, self.ask) as self.launch_id:
            await self._end.wait()

    async def finish(self) -> None:
        self._end.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


class World:
    """Everything around one Reconciler."""

    def __init__(
        self,
        *specs: ModelSpec,
        gpus: FakeGpus | None = None,
        stored: Sequence[ModelSpec] = (),
        rules: Rules | None = None,
        tick_s: float = 0.25,
    ) -> None:
        self.tick_s = tick_s
        self.clock, self.journal = Clock(), list[str]()
        self.gpus = gpus or FakeGpus()
        self.rules = rules or Rules()
        self.engines = FakeEngines(self.gpus, self.clock, self.journal)
        self.store = FakeStore(models={spec.name: spec for spec in stored})
        self.sources = FakeSources()
        self.wake = asyncio.Event()
        self.traffic = WatchedTraffic(self.journal, self.clock)
        self.registry = Registry(self.store, self.sources, specs, ["default"], self.rules, self.clock)
        observer = Observer(self.gpus, self.engines, self.traffic.seen, self.clock)
        self.loop = Reconciler(self.registry, self.traffic, self.engines, observer, self.store, self.rules, interval_s=0.25, wake=self.wake)
        self._requests: list[Request] = []

    async def tick(self, count: int = 1, seconds: float | None = None) -> None:
        for _ in range(count):
            self.clock.now += self.tick_s if seconds is None else seconds
            self.engines.step()
            await self.loop.tick()
            await self.loop.settle()
            await turns()
            self.check()

    async def until(self, model: str, state: State, ticks: int = 60) -> Instance:
        for _ in range(ticks):
            if (instance := self.instance(model)).state is state:
                return instance
            await self.tick()
        raise AssertionError(f"{model} is {self.instance(model)}, not {state}, after {ticks} ticks")

    def instance(self, model: str) -> Instance:
        found = self.loop.view.plan.instances.get(model) if self.loop.view else None
        return found or Instance(model)

    def states(self, model: str) -> list[str]:
        """What its events tell, in order."""
        return [event.kind for event in self.store.kept if event.model == model]

    async def add(self, name: str, start: bool = True, **fields: object) -> None:
        assert self.loop.view is not None
        await self.registry.add(spec(name, **fields), list(self.loop.view.snapshot.gpus.values()), start)

    async def limit(self, name: str, **changes: object) -> None:
        assert self.loop.view is not None
        await self.registry.limit(name, changes, list(self.loop.view.snapshot.gpus.values()))

    def request(self, model: str, ask: Ask = NOTHING) -> Request:
        self._requests.append(Request(self.traffic, model, ask))
        return self._requests[-1]

    async def ready(self, model: str, ask: Ask = NOTHING) -> Request:
        """Have a model started by a request, and hold that."""
        request = self.request(model, ask)
        await self.until(model, State.READY)
        await turns()
        return request

    def check(self) -> None:
        """What must hold after every look: a door that is open leads to a living engine of that model, and only to one."""
        for name, door in self.traffic.doors.items():
            if door.launch_id is not None:
                assert self.engines.all[door.launch_id].launch.spec.name == name
        running = [e.launch.spec.name for e in self.engines.all.values() if e.alive and not e.adopted]
        assert len(running) == len(set(running)), f"two engines of one model: {running}"

    async def close(self) -> None:
        for request in self._requests:
            request.task.cancel()
        await asyncio.gather(*(request.task for request in self._requests), return_exceptions=True)
        await self.loop.settle()


@contextlib.asynccontextmanager
async def world(
    *specs: ModelSpec,
    gpus: FakeGpus | None = None,
    stored: Sequence[ModelSpec] = (),
    rules: Rules | None = None,
    tick_s: float = 0.25,
) -> AsyncIterator[World]:
    """A world after its first look. `tick_s`: an engine starts in six of them, sleeps and wakes in one."""
    made = World(*specs, gpus=gpus, stored=stored, rules=rules, tick_s=tick_s)
    try:
        await made.registry.load()
        await made.tick()
        yield made
    finally:
        await made.close()
