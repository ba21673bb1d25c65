"""How long a request waits, what it is told meanwhile, and what the loop sees of those that wait."""

import asyncio
import sys

import pytest

from orchestrator.control import traffic as module
from orchestrator.control.traffic import Asker, Door
from orchestrator.errors import ModelUnavailable, NotInTime, WaitTimeout
from tests.control.visits import Hall, Visit
from tests.support.eventually import eventually, turns

pytestmark = pytest.mark.asyncio
SHORT_S = 0.02


@pytest.mark.parametrize(
    ("max_wait_s", "patience_s", "whose"), [(SHORT_S, None, r"requests\.max_wait"), (60.0, SHORT_S, "its own timeout")]
)
async def test_waiting_too_long_leaves_no_trace(max_wait_s: float, patience_s: float | None, whose: str) -> None:
    hall = Hall(max_wait_s)
    await hall.door(None, retry_after_s=0)
    request = await hall.come(patience_s=patience_s)
    await hall.door(None, retry_after_s=17)  # the estimate of now counts, not that of when it came
    hall.clock.now += 5
    with pytest.raises(WaitTimeout, match=whose) as error:
        await request.task
    assert (error.value.status, error.value.retry_after_s) == (503, 17)
    assert hall.counts() == (0, 0)
    await hall.door()
    assert hall.counts() == (0, 0)
    assert hall.traffic.seen()["a"].last_used == hall.clock.now  # somebody is to come back: the model is wanted until then


async def test_the_shorter_of_two_timeouts_counts() -> None:
    hall = Hall(max_wait_s=SHORT_S)
    await hall.door(None, retry_after_s=0)
    with pytest.raises(WaitTimeout, match="max_wait"):
        await (await hall.come(patience_s=3600)).task


@pytest.mark.parametrize(("max_wait_s", "patience_s", "whose"), [(30.0, None, r"30s \(requests\.max_wait\)"), (60.0, 30.0, "30s .its own")])
async def test_who_would_wait_in_vain_is_told_at_once_and_the_model_is_started(
    max_wait_s: float, patience_s: float | None, whose: str
) -> None:
    hall = Hall(max_wait_s)
    await hall.door(None, retry_after_s=41)
    assert hall.traffic.seen()["a"].last_used is None
    with pytest.raises(NotInTime, match=whose) as error:
        await (await hall.come(patience_s=patience_s)).task
    assert (error.value.status, error.value.retry_after_s, hall.wakes) == (503, 41, 1)
    assert hall.counts() == (0, 0)
    assert hall.traffic.seen()["a"].last_used == hall.clock.now
    await hall.door(None, retry_after_s=29)
    in_time = await hall.come(patience_s=patience_s)
    assert hall.counts() == (0, 1)
    await in_time.cancel()


async def test_before_an_open_door_nobody_knows_how_long_it_takes() -> None:
    hall = Hall()
    await hall.door(retry_after_s=41, max_concurrency=1)
    first = await hall.come(patience_s=1)
    second = await hall.come(patience_s=1)
    assert hall.counts() == (1, 1)
    await first.finish()
    await turns()
    assert second.launch_id == "one"
    await second.finish()


async def test_who_waits_is_told_at_once_and_whenever_the_phase_changes() -> None:
    hall = Hall()
    await hall.door(None, phase="waiting for memory")
    request, silent = await hall.come(tell=True), await hall.come()
    assert [door.phase for door in request.heard] == ["waiting for memory"]
    await hall.door(None, phase="waiting for memory", retry_after_s=1)
    assert len(request.heard) == 1
    await hall.door(None, phase="starting, loading weights")
    await hall.door(None, phase="starting, capturing graphs")
    await hall.door(phase="ready", max_concurrency=1)
    assert [door.phase for door in request.heard][1:] == ["starting, loading weights", "starting, capturing graphs"]
    assert request.launch_id == "one"
    behind = await hall.come(tell=True)
    await hall.door(None, phase="ready")  # its engine is gone, whatever the phase says
    assert [door.launch_id for door in behind.heard] == ["one", None]
    assert silent.heard == []
    await request.finish()
    for visit in (behind, silent):
        await visit.cancel()


async def test_who_need_not_wait_is_told_nothing() -> None:
    hall = Hall()
    await hall.door()
    request = await hall.come(tell=True)
    assert (request.launch_id, request.heard) == ("one", [])
    await request.finish()


async def test_it_is_told_again_and_again_where_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TELL_S", 0.001)
    hall = Hall()
    await hall.door(None, phase="starting")
    request = await hall.come(tell=True)
    await eventually(lambda: len(request.heard) > 3, "it hears the same again")
    assert {door.phase for door in request.heard} == {"starting"}
    await request.cancel()


class Deaf:
    """A client that reads nothing: what it is told last hangs until `reads` is set."""

    def __init__(self) -> None:
        self.reads, self.heard = asyncio.Event(), list[str]()

    async def tell(self, door: Door) -> None:
        self.heard.append(door.phase)
        await self.reads.wait()


async def test_what_changes_while_it_is_told_something_is_told_next() -> None:
    hall, deaf = Hall(), Deaf()
    await hall.door(None, phase="one")
    request = await hall.come(tell=deaf.tell)
    await hall.door(None, phase="two")
    await hall.door(None, phase="three")
    assert deaf.heard == ["one"]
    deaf.reads.set()
    await turns()
    assert deaf.heard == ["one", "three"]
    await hall.door()
    assert request.launch_id == "one"
    await request.finish()


async def test_a_client_that_does_not_read_waits_no_longer_than_others() -> None:
    hall, deaf = Hall(), Deaf()
    await hall.door(None, retry_after_s=0)
    request = await hall.come(patience_s=SHORT_S, tell=deaf.tell)
    with pytest.raises(WaitTimeout):
        await request.task
    assert hall.counts() == (0, 0)


async def test_a_client_that_leaves_while_it_is_told_something_hands_its_place_on() -> None:
    hall, deaf = Hall(), Deaf()
    await hall.door(None)
    request, other = await hall.come(tell=deaf.tell), await hall.come()
    await hall.door(max_concurrency=1)  # granted, but it hangs in what it was told
    assert (hall.counts(), request.launch_id) == ((1, 1), None)
    await request.cancel()
    assert other.launch_id == "one"
    await other.finish()
    assert hall.counts() == (0, 0)


async def test_a_tell_that_fails_ends_the_request_and_nothing_else() -> None:
    async def broken(door: Door) -> None:
        raise OSError("the client is gone")

    hall = Hall()
    await hall.door(None)
    with pytest.raises(OSError, match="gone"):
        await (await hall.come(tell=broken)).task
    assert hall.counts() == (0, 0)


@pytest.mark.parametrize("told", [True, False])
async def test_a_refusal_reaches_who_waits_and_who_is_told(told: bool) -> None:
    hall = Hall()
    await hall.door(None)
    request = await hall.come(tell=told)
    await hall.door(None, error=ModelUnavailable("down", code="model_failed"))
    with pytest.raises(ModelUnavailable):
        await request.task


async def test_the_loop_sees_since_when_somebody_waits() -> None:
    hall = Hall()
    await hall.door(None)
    first = await hall.come("b")
    hall.clock.now += 5
    second = await hall.come("a", 8)
    assert hall.traffic.seen()["a"].waiting_since == 1000.0
    await first.cancel()
    assert hall.traffic.seen()["a"].waiting_since == 1005.0
    await second.cancel()
    assert hall.traffic.seen()["a"].waiting_since is None


async def test_each_request_is_an_arrival_also_one_that_is_refused() -> None:
    hall = Hall()
    await hall.door(None, retry_after_s=41, max_queue=1)
    waits, full, vain = await hall.come(), await hall.come(), await hall.come(patience_s=1)
    assert full.task.exception() is not None
    assert isinstance(vain.task.exception(), NotInTime)
    assert hall.traffic.seen()["a"].arrivals == pytest.approx(3 / 300)
    hall.clock.now += 300
    assert hall.traffic.seen()["a"].arrivals == pytest.approx(3 / 300 / 2.71828, rel=1e-3)
    await waits.cancel()


async def test_a_look_costs_the_same_however_many_wait() -> None:
    """Counted in what is touched, not in time: a look may not go over those that wait."""
    hall = Hall()
    await hall.door(None, max_queue=4000)
    visits = [Visit(hall.traffic, "a", asker=Asker(f"client {n % 100}", n % 17 - 8)) for n in range(2000)]
    await turns()
    touched = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal touched
        touched += 1

    sys.setprofile(count)
    try:
        seen = hall.traffic.seen()["a"]
    finally:
        sys.setprofile(None)
    assert (seen.waiting, seen.priority) == (2000, 8)
    assert touched < len(visits) / 4
    for visit in visits:
        visit.task.cancel()
    await asyncio.wait([visit.task for visit in visits])
    assert hall.counts() == (0, 0)
