"""Random histories at the doors of two models: the count of requests in flight is that of the requests themselves, always."""

import asyncio

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.control.traffic import Ask, Door, Traffic
from orchestrator.errors import ModelUnavailable
from tests.control.fakes import Clock
from tests.control.world import Request
from tests.support.eventually import turns

DOWN = ModelUnavailable("down", code="model_failed")


class AnyHistory(RuleBasedStateMachine):
    """Doors open, shut, narrow and vanish; requests come, leave and finish; the event loop runs a little or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.traffic = Traffic(lambda: None, max_wait_s=3600.0, clock=Clock())
        self.doors: dict[str, Door] = {}
        self.requests: list[tuple[str, Request]] = []
        self.orphans: list[Request] = []  # in flight at a model that was removed since
        self.quiet = True

    def teardown(self) -> None:
        for _, request in self.requests:
            request.task.cancel()
        self.run_loop(50)
        for _, request in self.requests:
            assert request.task.done()
            request.task.cancelled() or request.task.exception()
        assert all(seen.in_flight == seen.waiting == 0 for seen in self.traffic.seen().values())
        self.loop.close()

    def run_loop(self, rounds: int) -> None:
        self.loop.run_until_complete(turns(rounds))

    def publish(self) -> None:
        self.traffic.publish(self.doors)

    names = st.sampled_from(["a", "b"])

    @rule(name=names, width=st.integers(1, 3), queue=st.integers(0, 4))
    def open(self, name: str, width: int, queue: int) -> None:
        self.doors[name] = Door("launch", max_concurrency=width, max_queue=queue)
        self.publish()

    @rule(name=names)
    def shut(self, name: str) -> None:
        self.doors[name] = Door(None)
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

    @rule(name=names, most=st.integers(0, 3))
    def come(self, name: str, most: int) -> None:
        async def make() -> Request:
            return Request(self.traffic, name, Ask(most, most, most))

        self.requests.append((name, self.loop.run_until_complete(make())))

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
            assert seen.in_flight == sum(r.launch_id is not None for r in mine)
            assert seen.waiting == sum(r.launch_id is None for r in mine)
            assert seen.largest_tokens == max((r.ask.most for r in mine), default=0)
            assert seen.waiting_tokens == sum(r.ask.likely for r in mine if r.launch_id is None)
            door = self.doors[name]
            if door.launch_id is not None and seen.waiting:
                assert seen.in_flight >= door.max_concurrency  # nobody waits before an open door with room
            waiting = [r for r in mine if r.launch_id is None]
            if waiting:  # first come, first served
                assert all(mine.index(r) < mine.index(waiting[0]) for r in mine if r.launch_id is not None)
        self.requests = [(n, r) for n, r in self.requests if not (r.task.done() and (r.task.cancelled() or r.task.exception() or True))]

    @invariant()
    def never_negative(self) -> None:
        assert all(seen.in_flight >= 0 and seen.waiting >= 0 for seen in self.traffic.seen().values())


AnyHistory.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyHistory = AnyHistory.TestCase
