"""Requests at the doors of their models: the count of those in flight is exact, whoever leaves at whatever moment.

These are the moments that once went wrong somewhere, or easily could; test_traffic_histories.py drives random ones.
"""

from dataclasses import replace

import pytest

from orchestrator.control.traffic import Door, Traffic
from orchestrator.errors import ModelNotFound, ModelUnavailable, QueueFull
from orchestrator.policy.snapshot import TrafficSeen
from tests.control.fakes import Clock
from tests.control.world import Request
from tests.support.eventually import turns

DOWN = ModelUnavailable("down", code="model_failed")


class Doors:
    """One model's door and the requests at it."""

    def __init__(self) -> None:
        self.wakes, self.clock = 0, Clock()
        self.traffic = Traffic(self._wake, 60.0, self.clock)
        self.requests: list[Request] = []

    def _wake(self) -> None:
        self.wakes += 1

    def door(self, launch_id: str | None = "one", max_concurrency: int = 256, max_queue: int = 512) -> None:
        self.traffic.publish({"a": Door(launch_id, max_concurrency=max_concurrency, max_queue=max_queue)})

    async def request(self) -> Request:
        self.requests.append(Request(self.traffic, "a"))
        await turns()
        return self.requests[-1]

    def counts(self) -> tuple[int, int]:
        seen = self.traffic.seen()["a"]
        return seen.in_flight, seen.waiting


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.mark.asyncio
async def test_an_open_door_lets_in_at_once_and_a_lease_comes_back(doors: Doors) -> None:
    doors.door()
    request = await doors.request()
    assert (request.launch_id, doors.counts()) == ("one", (1, 0))
    doors.clock.now += 5
    await request.finish()
    assert replace(doors.traffic.seen()["a"], arrivals=0.0) == TrafficSeen(0, 0, last_used=doors.clock.now)
    assert doors.wakes == 0  # nothing that the loop must see at once


@pytest.mark.asyncio
async def test_the_last_lease_of_a_door_that_was_shut_wakes_the_loop(doors: Doors) -> None:
    """A draining model may end now."""
    doors.door()
    first, last = await doors.request(), await doors.request()
    doors.door(None)
    await first.finish()
    assert doors.wakes == 0
    await last.finish()
    assert doors.wakes == 1


@pytest.mark.asyncio
async def test_the_last_lease_of_a_model_wakes_the_loop_where_somebody_waits_at_another_door(doors: Doors) -> None:
    """Its room may be what that one waits for."""
    doors.traffic.publish({"a": Door("one"), "b": Door(None)})
    running = await doors.request()
    waiting = Request(doors.traffic, "b")
    await turns()
    doors.wakes = 0
    await running.finish()
    assert doors.wakes == 1
    await waiting.cancel()


@pytest.mark.asyncio
async def test_a_lease_comes_back_when_the_request_fails(doors: Doors) -> None:
    doors.door()
    with pytest.raises(RuntimeError, match="upstream"):
        async with doors.traffic.lease("a"):
            raise RuntimeError("upstream")
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_a_model_that_is_not_ready_is_woken_and_waited_for(doors: Doors) -> None:
    doors.door(None)
    request = await doors.request()
    assert (doors.wakes, doors.counts(), request.launch_id) == (1, (0, 1), None)
    doors.door("two")
    await turns()
    assert (request.launch_id, doors.counts()) == ("two", (1, 0))
    await request.finish()


@pytest.mark.asyncio
async def test_an_unknown_model_is_not_found(doors: Doors) -> None:
    with pytest.raises(ModelNotFound, match="'a' does not exist"):
        async with doors.traffic.lease("a"):
            pass
    assert doors.traffic.seen() == {}


@pytest.mark.asyncio
async def test_first_come_first_served_and_never_more_than_max_concurrency(doors: Doors) -> None:
    doors.door(max_concurrency=2)
    requests = [await doors.request() for _ in range(5)]
    assert doors.counts() == (2, 3)
    order = []
    for at, request in enumerate(requests):
        order.append([r.launch_id is not None for r in requests])
        await request.finish()
        await turns()
        assert doors.counts() == (min(2, 4 - at), max(0, 2 - at))
    assert order[0] == [True, True, False, False, False]
    assert order[1] == [True, True, True, False, False]
    assert order[2] == [True, True, True, True, False]


@pytest.mark.asyncio
async def test_who_comes_later_does_not_overtake(doors: Doors) -> None:
    doors.door(max_concurrency=1)
    first, second = await doors.request(), await doors.request()
    first._end.set()
    late = Request(doors.traffic, "a")  # comes in the very moment in which the place is free again
    doors.requests.append(late)
    await turns()
    assert second.launch_id == "one"
    assert late.launch_id is None
    await first.task
    await second.finish()
    await late.finish()


@pytest.mark.asyncio
async def test_cancelled_while_queued_leaves_no_trace(doors: Doors) -> None:
    doors.door(max_concurrency=1)
    first, second, third = [await doors.request() for _ in range(3)]
    await second.cancel()
    assert doors.counts() == (1, 1)
    await first.finish()
    await turns()
    assert third.launch_id == "one"
    await third.finish()
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_cancelled_in_the_instant_of_the_grant_hands_its_place_on(doors: Doors) -> None:
    doors.door(None)
    first, second = await doors.request(), await doors.request()
    doors.door(max_concurrency=1)  # grants first, whose task has not run yet
    assert doors.counts() == (1, 1)
    first.task.cancel()
    await turns()
    assert first.launch_id is None
    assert second.launch_id == "one"
    assert doors.counts() == (1, 0)
    await second.finish()
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_cancelled_in_the_instant_of_a_refusal(doors: Doors) -> None:
    doors.door(None)
    request = await doors.request()
    doors.traffic.publish({"a": Door(error=DOWN)})
    request.task.cancel()
    await turns()
    assert request.task.cancelled()
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_all_waiters_cancelled_in_one_instant(doors: Doors) -> None:
    doors.door(None)
    requests = [await doors.request() for _ in range(10)]
    doors.door(max_concurrency=3)
    for request in requests:
        request.task.cancel()
    await turns(40)
    assert all(request.task.cancelled() for request in requests)
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_a_full_queue_is_refused_with_when_to_come_back(doors: Doors) -> None:
    doors.traffic.publish({"a": Door(None, retry_after_s=7, max_queue=1)})
    await doors.request()
    refused = await doors.request()
    with pytest.raises(QueueFull, match="max_queue") as error:
        await refused.task
    assert error.value.retry_after_s == 7
    assert doors.counts() == (0, 1)
    await doors.requests[0].cancel()


@pytest.mark.asyncio
async def test_max_queue_0_still_lets_in_who_need_not_wait(doors: Doors) -> None:
    doors.door(max_queue=0)
    request = await doors.request()
    assert request.launch_id == "one"
    await request.finish()


@pytest.mark.asyncio
async def test_a_door_that_shuts_refuses_who_waits_and_leaves_who_runs(doors: Doors) -> None:
    doors.door(max_concurrency=1)
    runs, waits = await doors.request(), await doors.request()
    doors.traffic.publish({"a": Door(error=DOWN)})
    await turns()
    with pytest.raises(ModelUnavailable):
        await waits.task
    assert doors.counts() == (1, 0)
    with pytest.raises(ModelUnavailable):
        await (await doors.request()).task
    await runs.finish()
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_removal_while_in_flight(doors: Doors) -> None:
    doors.door(max_concurrency=1)
    runs, waits = await doors.request(), await doors.request()
    doors.traffic.publish({})
    await turns()
    with pytest.raises(ModelNotFound, match="removed"):
        await waits.task
    assert doors.traffic.seen() == {}
    doors.door("again", max_concurrency=1)
    fresh = await doors.request()
    assert (fresh.launch_id, doors.counts()) == ("again", (1, 0))
    await runs.finish()  # gives its place back to the model it was taken from, not to its namesake
    assert doors.counts() == (1, 0)
    await fresh.finish()
    assert doors.counts() == (0, 0)


@pytest.mark.asyncio
async def test_a_raised_max_concurrency_lets_more_in_and_a_lowered_one_lets_who_is_in_finish(doors: Doors) -> None:
    doors.door(max_concurrency=1)
    requests = [await doors.request() for _ in range(4)]
    doors.door(max_concurrency=3)
    await turns()
    assert doors.counts() == (3, 1)
    doors.door(max_concurrency=1)
    await requests[0].finish()
    await turns()
    assert doors.counts() == (2, 1)
    for request in requests[1:]:
        await request.finish()
    assert doors.counts() == (0, 0)
