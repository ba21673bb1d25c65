"""The one loop. tick(): observe -> decide -> act -> publish; run(): tick, then wait for `wake`, which the interval sets too.

Between the end of observe and the end of publish nothing awaits: that is what "one writer, no locks" means in asyncio.
Whatever happens merely sets `wake`; the loop never learns what it was, it looks.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.control.act import act
from orchestrator.control.calm import Calm
from orchestrator.control.counts import Counts
from orchestrator.control.doors import door, shutting_down
from orchestrator.control.observe import Observer
from orchestrator.control.ports import Engines, Store
from orchestrator.control.registry import Registry
from orchestrator.control.traffic import Traffic
from orchestrator.policy.budgets import PoolMemory
from orchestrator.policy.decide import Plan, decide
from orchestrator.policy.instance import Instance, Launch, State
from orchestrator.policy.lifecycle import NEVER, Known, Rules
from orchestrator.policy.preview import Preview, preview
from orchestrator.policy.resident import Aging
from orchestrator.policy.snapshot import Snapshot, TrafficSeen
from orchestrator.policy.stored import Event

log = logging.getLogger(__name__)

COALESCE_S = 0.02  # a burst of wake-ups is one look


@dataclass(frozen=True, slots=True)
class View:
    """The last look and what was decided from it: what status, describe and metrics are projections of."""

    snapshot: Snapshot
    plan: Plan
    ticks: int
    errors: int
    took_s: float


class Reconciler:
    def __init__(
        self,
        registry: Registry,
        traffic: Traffic,
        engines: Engines,
        observer: Observer,
        store: Store,
        rules: Rules,
        interval_s: float,
        wake: asyncio.Event,
        on_tick: Callable[[View], None] = lambda view: None,
        counts: Counts | None = None,
    ) -> None:
        self._counts = counts or Counts()
        self._registry, self._traffic, self._engines, self._observer = registry, traffic, engines, observer
        self._store, self._rules, self._interval_s, self._wake, self._on_tick = store, rules, interval_s, wake, on_tick
        self._instances: dict[str, Instance] = {}
        self._pool_memory: dict[str, PoolMemory] = {}
        self._aging = Aging()
        self._calm = Calm()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = self.over = False
        self._ticks = self._errors = 0
        self.view: View | None = None
        self.ticked = asyncio.Condition()  # notified after each tick

    def adopt(self, launches: Iterable[Launch], now: float) -> None:
        """Engines that a former daemon left running: each is a start that is under way, and the loop goes on from there."""
        for launch in launches:
            name, reason = launch.spec.name, "found running when the daemon started"
            self._instances[name] = Instance(name, State.STARTING, now, reason, launch=launch)
            self._note([Event(time.time(), name, "adopted", reason)])

    async def run(self) -> None:
        """Until every engine has ended after stop(). A tick that fails is logged and counted; the next one looks afresh."""
        clock = asyncio.get_running_loop()
        while not (self._stopping and not self._instances):
            self._wake.clear()
            try:
                await self.tick()
            except Exception:
                self._errors += 1
                self._counts.loop_errors += 1
                log.exception("the control loop failed in this tick; it goes on")
                await asyncio.sleep(self._interval_s)
            ticked = clock.time()
            timer = clock.call_later(self._interval_s, self._wake.set)
            await self._wake.wait()
            timer.cancel()
            if (early := ticked + COALESCE_S - clock.time()) > 0:
                await asyncio.sleep(early)
        self.over = True
        async with self.ticked:
            self.ticked.notify_all()  # for whoever waits for a look: there is none to come

    def heed(self, rules: Rules, interval_s: float) -> None:
        """From the next look on."""
        self._rules, self._interval_s = replace(rules, stopping=self._stopping), interval_s

    def stop(self) -> None:
        """From now on no model is wanted: what runs is drained and ended."""
        self._stopping = True
        self._rules = replace(self._rules, stopping=True)
        self._wake.set()

    async def tick(self) -> None:
        snapshot = await self._observer.look()
        started = time.perf_counter()
        known: dict[str, Known] = {} if self._stopping else dict(self._registry.known())
        plan = self.view.plan if self.view and self._calm.holds(known, snapshot) else self._decide(known, snapshot)
        self._ticks += 1
        self.view = View(snapshot, plan, self._ticks, self._errors, time.perf_counter() - started)
        self._counts.looks.add(self.view.took_s)
        self._on_tick(self.view)
        async with self.ticked:
            self.ticked.notify_all()

    def _decide(self, known: Mapping[str, Known], snapshot: Snapshot) -> Plan:
        before = self._instances
        plan = decide(known, before, self._pool_memory, snapshot, self._rules, lambda: secrets.token_hex(4), self._aging)
        self._instances, self._pool_memory, self._aging = dict(plan.instances), dict(plan.pool_memory), plan.aging
        act(plan.actions, self._engines, self._registry, self._spawn)
        self._counts.acted(plan.actions)
        for launch_id in snapshot.engines.keys() - {i.launch.id for i in self._instances.values() if i.launch}:
            if snapshot.engines[launch_id].gone:
                self._engines.forget(launch_id)
        doors = self._registry.known().keys() | plan.instances.keys()
        self._traffic.publish({name: shutting_down() if self._stopping else door(name, known.get(name), plan, snapshot) for name in doors})
        self._report(before, plan, snapshot)
        self._calm.decided(known, snapshot, plan)
        return plan

    def requests(self, name: str) -> TrafficSeen:
        """A model's requests now, not at the last look."""
        return self._traffic.seen().get(name, TrafficSeen())

    def preview(self, name: str) -> Preview:
        """What loading a registered model would do now; nothing is done. Needs a look to have been made."""
        assert self.view is not None
        snapshot, known = self.view.snapshot, dict(self._registry.known())
        known[name] = replace(known[name], started_at=snapshot.now, held=False, rested_at=NEVER)
        plan = decide(known, self._instances, self._pool_memory, snapshot, self._rules, lambda: "preview", self._aging)
        return preview(name, self._instances, plan, known, snapshot.now)

    def note(self, model: str, kind: str, reason: str) -> None:
        """An operator did something: it belongs between the states."""
        self._note([Event(time.time(), model, kind, reason)])
        self._wake.set()

    def _report(self, before: dict[str, Instance], plan: Plan, snapshot: Snapshot) -> None:
        """One line and one event for each real change of state, none for what stays."""
        events = []
        for name, instance in plan.instances.items():
            old = before.get(name)
            if old is not None and (old.state, old.since) == (instance.state, instance.since):
                continue
            if old is None and instance.state is State.STOPPED:
                continue
            bad = instance.failing or instance.state in (State.BACKOFF, State.FAILED)
            told = {"told": {"model": name, "kind": instance.state.value}}
            log.log(logging.WARNING if bad else logging.INFO, "%s: %s: %s", name, instance.state, instance.reason, extra=told)
            events.append(Event(time.time(), name, instance.state.value, instance.reason))
            seen = snapshot.engines.get(instance.launch.id) if instance.launch else None
            self._counts.moved(old, instance, adopted=seen is not None and seen.adopted)
        for name in before.keys() - plan.instances.keys():
            log.info("%s: gone", name, extra={"told": {"model": name, "kind": "gone"}})
            self._counts.forget(name)
        if events:
            self._note(events)
            self._wake.set()  # a state that has just been reached may allow the next move at once

    def _note(self, events: list[Event]) -> None:
        self._spawn(self._store.add_events(events))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # asyncio keeps only weak references to tasks
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("could not be kept: %s", error)

    async def settle(self) -> None:
        """Until what was to be written is written."""
        while self._tasks:
            await asyncio.wait(self._tasks)
