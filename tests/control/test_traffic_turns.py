"""Whose turn it is: no client pushes another behind all of its own, priorities are obeyed and do not starve, and places are bounded."""

import pytest

from orchestrator.control.queue import AGE_S
from orchestrator.control.traffic import Asker, Door
from orchestrator.errors import QueueFull
from tests.control.visits import Hall, Visit, clients
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


async def test_clients_are_served_in_turn_and_each_in_its_own_order() -> None:
    hall = Hall()
    await hall.door(None)
    flood = [await hall.come("flood") for _ in range(5)]
    await hall.come("b")
    await hall.come("c")
    await hall.come("b")
    await hall.door(max_concurrency=1)
    order = await hall.served()
    assert clients(order) == "flood b c flood b flood flood flood"
    assert [visit for visit in order if visit in flood] == flood


async def test_who_comes_while_a_flood_is_served_waits_for_one_of_it() -> None:
    hall = Hall()
    await hall.door(max_concurrency=2)
    for _ in range(8):
        await hall.come("flood")
    late = await hall.come("late")
    await hall.visits[0].finish()
    await turns()
    assert (late.launch_id, hall.visits[2].launch_id) == (None, "one")
    await hall.visits[1].finish()
    await turns()
    assert late.launch_id == "one"
    await hall.served()


async def test_priority_goes_first_and_is_what_the_loop_sees() -> None:
    hall = Hall()
    await hall.door(None)
    assert hall.traffic.seen()["a"].priority == 0
    await hall.come("low", -8)
    assert hall.traffic.seen()["a"].priority == -8
    await hall.come("plain")
    await hall.come("high", 3)
    assert hall.traffic.seen()["a"].priority == 3
    await hall.door(max_concurrency=1)
    assert clients(await hall.served()) == "high plain low"
    assert hall.traffic.seen()["a"].priority == 0


async def test_waiting_raises_a_priority_and_the_loop_sees_it() -> None:
    hall = Hall()
    await hall.door(None)
    await hall.come("old", -1)
    came = hall.clock.now
    hall.clock.now += AGE_S - 1
    await hall.come("new", 0)
    assert hall.traffic.seen()["a"].priority == 0
    hall.clock.now += AGE_S + 2  # the old one has waited for two levels, the new one for one
    assert hall.traffic.seen()["a"].priority == 1
    assert hall.traffic.seen()["a"].waiting_since == came
    hall.clock.now = came + AGE_S + 1
    await hall.come("newest", 0)
    await hall.door(max_concurrency=1)
    assert clients(await hall.served()) == "new old newest"
    assert hall.traffic.seen()["a"].waiting_since is None


async def test_a_low_priority_gets_its_turn_under_an_endless_stream_of_a_high_one() -> None:
    hall = Hall()
    await hall.door(max_concurrency=1)
    await hall.come("busy", 8)
    low = await hall.come("low", 6)
    for _ in range(100):
        running = next(visit for visit in hall.visits if visit.launch_id and not visit.task.done())
        if running is low:
            break
        await hall.come("busy", 8)
        hall.clock.now += 1.0
        await running.finish()
        await turns()
    assert low.launch_id == "one"
    assert hall.clock.now == 1000.0 + 2 * AGE_S + 1
    await hall.served()


async def test_who_leaves_in_the_instant_of_its_turn_takes_nobodys() -> None:
    hall = Hall()
    await hall.door(None)
    first, second, other = [await hall.come(client) for client in ("a", "a", "b")]
    first.task.cancel()  # it has not run yet: the queue still holds it
    hall.traffic.publish({"a": Door("one", max_concurrency=1)})
    await turns()
    assert (second.launch_id, other.launch_id) == ("one", None)
    assert clients(await hall.served()) == "a b"


async def test_all_doors_together_have_a_bound_too() -> None:
    hall = Hall(max_queue=3)
    doors = {"a": Door(retry_after_s=9), "b": Door()}
    hall.traffic.publish(doors)
    waiting = [await hall.come(model=model) for model in ("a", "b", "b")]
    for model, seconds in (("a", 9), ("b", 5)):
        with pytest.raises(QueueFull, match=r"3 requests wait for their models already \(requests\.max_queue\)") as error:
            await (await hall.come(model=model)).task
        assert error.value.retry_after_s == seconds
    await waiting[0].cancel()
    again = await hall.come(model="b")
    assert (hall.traffic.seen()["a"].waiting, hall.traffic.seen()["b"].waiting) == (0, 3)
    hall.traffic.publish({"a": Door("one"), "b": Door("two", max_concurrency=1)})
    await turns()
    assert (await hall.come(model="a")).launch_id == "one"  # who need not wait needs no place
    hall.traffic.publish({"a": Door("one", max_concurrency=1)})  # those at `b` are refused with it, and their places are free
    await turns()
    assert [visit.task.done() for visit in (waiting[2], again)] == [True, True]
    for _ in range(3):
        await hall.come()
    assert hall.counts() == (1, 3)
    with pytest.raises(QueueFull):
        await (await hall.come()).task
    await hall.all_leave()


async def test_in_a_full_queue_one_client_makes_place_for_another() -> None:
    """Else a client that floods would have every other one refused."""
    hall = Hall()
    await hall.door(None, max_queue=4)
    flood = [await hall.come("flood", priority) for priority in (0, -1, -1, 0)]
    with pytest.raises(QueueFull, match=r"4 requests wait for 'a' already \(max_queue\)"):
        await (await hall.come("flood", 8)).task
    one = await hall.come("b")
    with pytest.raises(QueueFull) as error:
        await flood[2].task  # the newest of the least urgent
    assert error.value.status == 429
    two = await hall.come("b")
    assert flood[1].task.done()
    with pytest.raises(QueueFull):
        await (await hall.come("b")).task  # it has its half
    third = await hall.come("c")
    assert hall.counts() == (0, 4)
    assert sum(visit.task.done() for visit in (*flood, one, two)) == 3
    assert not third.task.done()
    await hall.all_leave()
    assert hall.counts() == (0, 0)


async def test_one_that_is_put_out_in_the_instant_in_which_it_leaves_costs_one_place() -> None:
    hall = Hall()
    await hall.door(None, max_queue=2)
    flood = [await hall.come("flood") for _ in range(2)]
    late = Visit(hall.traffic, "a", asker=Asker("b"))  # its task is the next to run
    flood[1].task.cancel()
    await turns()
    assert flood[1].task.cancelled()
    assert hall.counts() == (0, 2)
    for visit in (flood[0], late):
        await visit.cancel()
    assert hall.counts() == (0, 0)
