"""Random histories at the doors of two models: the count of requests in flight is that of the requests themselves, always.

Whoever comes, leaves, finishes or is put out at whatever moment: nobody waits before room, all bounds hold, all turns are taken in
order, and who wants to be told knows the last phase.
"""

import asyncio
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.control.queue import AGE_S
from orchestrator.control.traffic import Ask, Asker, Door, Traffic
from orchestrator.errors import ModelUnavailable
from tests.control.fakes import Clock
from tests.control.visits import Visit
from tests.support.eventually import turns

DOWN = ModelUnavailable("down", code="model_failed")
MOST = 7  # that may wait in all


class AnyHistory(RuleBasedStateMachine):
    """Doors open, shut, narrow and vanish; requests come, leave, finish and give up; the event loop runs a little or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.traffic = Traffic(lambda: None, max_wait_s=3600.0, clock=self.clock, max_queue=MOST)
        self.doors: dict[str, Door] = {}
        self.requests: list[tuple[str, Visit]] = []
        self.orphans: list[Visit] = []  # in flight at a model that was removed since
        self.phases = 0

    def teardown(self) -> None:
        for _, request in self.requests:
            request.task.cancel()
        self.run_loop(50)
        for _, request in self.requests:
            assert request.task.done()
            request.task.cancelled() or request.task.exception()
        assert all(seen.in_flight == seen.waiting == 0 for seen in self.traffic.seen().values())
        assert self.traffic._waiting == 0
        self.loop.close()

    def run_loop(self, rounds: int) -> None:
        self.loop.run_until_complete(turns(rounds))

    def publish(self) -> None:
        self.traffic.publish(self.doors)

    def phase(self) -> str:
        self.phases += 1
        return f"phase {self.phases}"

    names = st.sampled_from(["a", "b"])

    @rule(name=names, width=st.integers(1, 3), queue=st.integers(0, 4))
    def open(self, name: str, width: int, queue: int) -> None:
        self.doors[name] = Door("launch", max_concurrency=width, max_queue=queue, phase=self.phase())
        self.publish()

    @rule(name=names, seconds=st.sampled_from([0.0, 5.0]), queue=st.integers(0, 6))
    def shut(self, name: str, seconds: float, queue: int) -> None:
        self.doors[name] = Door(None, retry_after_s=seconds, max_queue=queue, phase=self.phase())
        self.publish()

    @rule(name=names)
    def refuse(self, name: str) -> None:
        self.doors[name] = Door(error=DOWN)
        self.publish()

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.run_loop(50)  # so that who runs is known
        self.orphans += [r for n, r in self.requests if n == name and r.launch_id and not r.task.done()]
        self.doors.pop(name, None)
        self.publish()

    @rule(
        name=names,
        most=st.integers(0, 3),
        client=st.sampled_from("xyz"),
        priority=st.integers(-1, 1),
        patience_s=st.sampled_from([None, None, 0.0]),
        told=st.booleans(),
    )
    def come(self, name: str, most: int, client: str, priority: int, patience_s: float | None, told: bool) -> None:
        """A patience of 0 ends in the next round of the event loop, wherever the request is by then."""

        async def make() -> Visit:
            return Visit(self.traffic, name, Ask(most, most, most), Asker(client, priority, patience_s), told)

        self.requests.append((name, self.loop.run_until_complete(make())))

    @rule(seconds=st.sampled_from([1.0, AGE_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.requests))[1].task.cancel()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.requests))[1]._end.set()

    @rule(rounds=st.integers(1, 3))
    def go_on(self, rounds: int) -> None:
        self.run_loop(rounds)

    @rule()
    def settle_and_count(self) -> None:
        """When everything that can run has run, the counts are those of the requests themselves."""
        self.run_loop(50)
        for name, seen in self.traffic.seen().items():
            mine = [r for n, r in self.requests if n == name and not r.task.done() and r not in self.orphans]
            waiting = [r for r in mine if r.launch_id is None]
            assert seen.in_flight == len(mine) - len(waiting)
            assert seen.waiting == len(waiting)
            assert (seen.waiting_since is None) == (not waiting)
            assert seen.largest_tokens == max((r.ask.most for r in mine), default=0)
            assert seen.waiting_tokens == sum(r.ask.likely for r in waiting)
            door = self.doors[name]
            if door.launch_id is not None and seen.waiting:
                assert seen.in_flight >= door.max_concurrency  # nobody waits before an open door with room
            for later, request in enumerate(mine):  # first come, first served, within a client's requests of one priority
                for earlier in mine[:later]:
                    if (earlier.asker.client, earlier.asker.priority) == (request.asker.client, request.asker.priority):
                        assert earlier.launch_id is not None or request.launch_id is None
            told = [request for request in waiting if request._tell]
            assert all(request.heard[-1].phase == door.phase for request in told)  # no word is lost
            assert len(self.traffic._models[name].told) == len(told)
        self.requests = [(n, r) for n, r in self.requests if not (r.task.done() and (r.task.cancelled() or r.task.exception() or True))]

    @precondition(lambda self: any(door.error is None for door in self.doors.values()))
    @rule(data=st.data())
    def all_who_wait_are_served(self, data: st.DataObject) -> None:
        """Nobody starves: if the door opens and those who run finish, all get their turn, after one at most of each other client."""
        name = data.draw(st.sampled_from([name for name, door in self.doors.items() if door.error is None]))
        self.run_loop(50)
        waiting = [r for n, r in self.requests if n == name and not r.task.done() and r.launch_id is None]
        self.doors[name] = Door("launch", max_concurrency=1)
        self.publish()
        for _ in range(3 + len(self.requests)):
            self.run_loop(20)
            for other, request in self.requests:
                if other == name and request.launch_id is not None:
                    request._end.set()
        self.run_loop(20)
        assert all(request.task.done() and not request.task.cancelled() and request.task.exception() is None for request in waiting)
        for line in {(r.asker.priority, r.asker.client) for r in waiting}:
            rivals = [r for r in waiting if r.asker.priority == line[0]]
            first = min(r.turn for r in rivals if r.asker.client == line[1])
            assert max(Counter(r.asker.client for r in rivals if r.turn < first).values(), default=0) <= 1

    @invariant()
    def all_bounds_hold(self) -> None:
        traffic = self.traffic.seen()
        assert all(seen.in_flight >= 0 and seen.waiting >= 0 for seen in traffic.values())
        assert self.traffic._waiting == sum(seen.waiting for seen in traffic.values()) <= MOST


AnyHistory.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyHistory = AnyHistory.TestCase
