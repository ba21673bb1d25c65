"""What requests ask for, in tokens: the loop sees exact bounds, and the first request of an idle engine waits shortly for its room.

An engine whose limit is under what its only request needs would be stuck; a request that waits too long would be no better.
"""

from collections.abc import Sequence

import pytest

from orchestrator.control import traffic as module
from orchestrator.control.traffic import Ask, Door, Traffic
from orchestrator.errors import ModelNotFound, ModelUnavailable
from tests.control.fakes import Clock
from tests.control.world import Request
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio

SMALL, LARGE = Ask(most=300, first=100, likely=150), Ask(most=9000, first=5000, likely=1500)


class Doors:
    """One model's door and the requests at it. ROOM_S is set far away, so that only the door lets a request in."""

    def __init__(self) -> None:
        self.wakes = 0
        self.traffic = Traffic(self._wake, 60.0, Clock())
        self.requests: list[Request] = []

    def _wake(self) -> None:
        self.wakes += 1

    def door(self, fitting: int | None = None, launch_id: str | None = "one", max_concurrency: int = 256) -> None:
        self.traffic.publish({"a": Door(launch_id, max_concurrency=max_concurrency, fitting_tokens=fitting)})

    async def request(self, ask: Ask) -> Request:
        self.requests.append(Request(self.traffic, "a", ask))
        await turns()
        return self.requests[-1]

    def tokens(self) -> tuple[int, int]:
        seen = self.traffic.seen()["a"]
        return seen.largest_tokens, seen.waiting_tokens

    def counts(self) -> tuple[int, int]:
        seen = self.traffic.seen()["a"]
        return seen.in_flight, seen.waiting


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    monkeypatch.setattr(module, "ROOM_S", 3600.0)
    return Doors()


async def all_finish(requests: Sequence[Request]) -> None:
    for request in requests:
        await request.finish()


async def test_the_largest_of_those_that_run_or_wait_and_the_sum_of_those_that_wait(doors: Doors) -> None:
    doors.door(max_concurrency=2)
    assert doors.tokens() == (0, 0)
    small, again, large, last = [await doors.request(ask) for ask in (SMALL, SMALL, LARGE, SMALL)]
    assert doors.counts() == (2, 2)
    assert doors.tokens() == (9000, 1650)  # the large one only waits, and needs its room all the same
    await small.finish()
    await turns()
    assert doors.counts() == (2, 1)
    assert doors.tokens() == (9000, 150)
    await large.finish()
    await turns()
    assert doors.tokens() == (300, 0)  # of two of one size, one has left
    await all_finish([again, last])
    assert doors.tokens() == (0, 0)


async def test_who_leaves_the_queue_asks_for_nothing_any_more(doors: Doors) -> None:
    doors.door(launch_id=None)
    small, large = await doors.request(SMALL), await doors.request(LARGE)
    assert doors.tokens() == (9000, 1650)
    await large.cancel()
    assert doors.tokens() == (300, 150)
    doors.door()
    small.task.cancel()  # in the instant of its grant
    await turns()
    assert doors.tokens() == (0, 0)
    assert doors.counts() == (0, 0)


async def test_a_first_request_waits_until_the_loop_has_raised_the_limit(doors: Doors) -> None:
    doors.door(fitting=1000)
    request = await doors.request(LARGE)
    assert request.launch_id is None
    assert doors.counts() == (1, 0)  # it runs, as far as the loop knows: so its need counts
    assert doors.tokens() == (9000, 0)
    assert doors.wakes == 1  # and the loop need not wait for its interval
    doors.door(fitting=4999)
    await turns()
    assert (request.launch_id, doors.wakes) == (None, 2)
    doors.door(fitting=5000)
    await turns()
    assert request.launch_id == "one"
    await request.finish()
    assert doors.counts() == (0, 0)


@pytest.mark.parametrize("fitting", [None, 5000, 10**9])
async def test_one_that_fits_goes_at_once(doors: Doors, fitting: int | None) -> None:
    doors.door(fitting)
    request = await doors.request(LARGE)
    assert (request.launch_id, doors.wakes) == ("one", 0)
    await request.finish()


async def test_in_company_nobody_waits(doors: Doors) -> None:
    """Memory comes back when the others end, so the engine is not stuck; and the loop sees the need meanwhile."""
    doors.door(fitting=1000)
    small = await doors.request(SMALL)
    large = await doors.request(LARGE)
    assert (small.launch_id, large.launch_id) == ("one", "one")
    assert doors.tokens() == (9000, 0)
    await all_finish([small, large])


async def test_company_that_comes_ends_the_wait_at_the_next_look(doors: Doors) -> None:
    doors.door(fitting=1000)
    large = await doors.request(LARGE)
    small = await doors.request(SMALL)
    assert (large.launch_id, small.launch_id) == (None, "one")
    doors.door(fitting=1000)
    await turns()
    assert large.launch_id == "one"
    await all_finish([small, large])


async def test_after_a_while_it_goes_on_all_the_same(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM_S", 0.01)
    doors.door(fitting=0)
    async with doors.traffic.lease("a", LARGE) as launch_id:
        assert launch_id == "one"
        assert doors.counts() == (1, 0)
    assert doors.counts() == (0, 0)


async def test_a_client_that_leaves_while_room_is_made_leaves_no_trace(doors: Doors) -> None:
    doors.door(fitting=0)
    request = await doors.request(LARGE)
    assert doors.counts() == (1, 0)
    await request.cancel()
    assert (doors.counts(), doors.tokens()) == ((0, 0), (0, 0))
    doors.door(fitting=0)  # whoever waited for this word is gone


async def test_who_waited_for_a_start_and_does_not_fit_waits_for_room_too(doors: Doors) -> None:
    doors.door(launch_id=None)
    request = await doors.request(LARGE)
    doors.door(fitting=100)
    await turns()
    assert (request.launch_id, doors.counts()) == (None, (1, 0))
    doors.door()
    await turns()
    assert request.launch_id == "one"
    await request.finish()


@pytest.mark.parametrize("error", [ModelUnavailable("down", code="model_failed"), ModelNotFound("removed")])
async def test_a_door_that_shuts_meanwhile_does_not_keep_it_waiting(doors: Doors, error: ModelUnavailable | ModelNotFound) -> None:
    doors.door(fitting=0)
    request = await doors.request(LARGE)
    doors.traffic.publish({"a": Door(error=error)})
    await turns()
    assert request.launch_id == "one"  # what its engine answers is told by the proxy
    await request.finish()
    assert doors.counts() == (0, 0)
