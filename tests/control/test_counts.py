"""What has happened is counted once, under the model that it happened to, and forgotten with it."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.counts import ANSWER_S, LEFT, UPGRADED, Counts, Move, Spread
from orchestrator.control.keys import Usage
from orchestrator.policy.instance import State
from tests.control.fakes import spec
from tests.control.world import World, world
from tests.support.eventually import eventually, turns


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1e4)))
def test_each_value_is_in_the_first_bucket_that_it_fits(values: list[float]) -> None:
    spread = Spread(ANSWER_S)
    for value in values:
        spread.add(value)
    assert spread.sum == pytest.approx(sum(values))
    for number, bound in enumerate(ANSWER_S):
        assert sum(spread.counts[: number + 1]) == len([value for value in values if value <= bound])
    assert sum(spread.counts) == len(values)


def test_only_answers_that_are_no_errors_have_a_duration() -> None:
    counts = Counts()
    counts.answered("a", 200, 0.3, 0.02, Usage(10, 20))
    counts.answered("a", 200, 3.0, None, Usage(1, 2))
    counts.answered("a", 404, 0.001)
    counts.answered("a", LEFT, 9.0)
    counts.answered("a", 502, 9.0, code="engine_error")
    found = counts.models["a"]
    assert found.statuses == {200: 2, 404: 1, LEFT: 1, 502: 1}
    assert (sum(found.answers.counts), found.answers.sum) == (2, 3.3)
    assert (sum(found.firsts.counts), found.firsts.sum) == (1, 0.02)
    assert (found.prompt_tokens, found.completion_tokens, found.errors) == (11, 22, {"engine_error": 1})


def test_a_websocket_is_counted_and_has_no_duration() -> None:
    counts = Counts()
    counts.answered("a", UPGRADED, 3600.0, None, Usage(5, 6))
    found = counts.models["a"]
    assert (found.statuses, sum(found.answers.counts), found.completion_tokens) == ({UPGRADED: 1}, 0, 6)


def counts_of(there: World) -> Counts:
    return there.loop._counts


@pytest.mark.asyncio
async def test_a_start_a_sleep_and_a_wake_are_counted_with_their_seconds() -> None:
    async with world(spec("a", sleep_timeout=5, idle_timeout=None)) as there:
        request = await there.ready("a")
        found = counts_of(there).models["a"]
        assert (found.states["starting"], found.states["ready"], found.starts.count) == (1, 1, 1)
        assert found.starts.seconds == pytest.approx(5 * there.tick_s)  # FakeEngine's phases
        assert sum(found.limit_moves.values()) > 0
        await request.finish()
        await there.tick(seconds=6.0)
        await there.until("a", State.ASLEEP)
        assert (found.sleeps.count, found.wakes.count) == (1, 0)
        assert found.sleeps.seconds == pytest.approx(there.tick_s)
        again = there.request("a")
        await there.until("a", State.READY)
        assert (found.starts.count, found.wakes.count) == (1, 1)
        assert found.wakes.seconds == pytest.approx(there.tick_s)
        await again.finish()


@pytest.mark.asyncio
async def test_each_move_is_told_with_why_it_was_begun_and_why_it_failed() -> None:
    moves: list[Move] = []
    async with world(spec("a", sleep_timeout=5, idle_timeout=None)) as there:
        counts_of(there)._tell = moves.append
        await (await there.ready("a")).finish()
        await there.tick(seconds=6.0)
        await there.until("a", State.ASLEEP)
        await there.ready("a")
    async with world(spec("a")) as there:
        counts_of(there)._tell = moves.append
        there.engines.fail_next.append(("no such file", ()))
        there.request("a")
        await there.until("a", State.BACKOFF)
    assert [(move.kind, bool(move.failed)) for move in moves] == [("start", False), ("sleep", False), ("wake", False), ("start", True)]
    assert "no such file" in moves[-1].failed
    assert all(move.why and move.model == "a" and move.began < move.ended for move in moves)


@pytest.mark.asyncio
async def test_an_engine_that_dies_is_one_failure() -> None:
    async with world(spec("a")) as there:
        await there.ready("a")
        there.engines.crash("a")
        await there.until("a", State.BACKOFF)
        assert counts_of(there).models["a"].failures == 1


@pytest.mark.asyncio
async def test_an_adopted_engine_is_no_start() -> None:
    async with world(spec("a")) as there:
        await there.ready("a")
        launch = there.engines["a"].launch
        there.engines["a"].adopted = True
        async with world(spec("a")) as later:
            later.engines.all[launch.id] = there.engines["a"]
            later.loop.adopt([launch], later.clock.now)
            await later.until("a", State.READY)
            found = counts_of(later).models["a"]
            assert (found.states["ready"], found.starts.count) == (1, 0)


@pytest.mark.asyncio
async def test_who_had_to_wait_is_counted_when_its_turn_comes_and_who_need_not_wait_is_not() -> None:
    async with world(spec("a")) as there:
        first = await there.ready("a")
        waits = there.traffic._counts.models["a"].waits
        assert (sum(waits.counts), waits.sum) == (1, 5 * there.tick_s)  # it came before the look that started its engine
        second = there.request("a")
        await turns()
        assert second.launch_id is not None
        assert sum(waits.counts) == 1
        await first.finish()
        await second.finish()


@pytest.mark.asyncio
async def test_a_removed_model_is_forgotten() -> None:
    async with world() as there:
        await there.add("a")
        await there.until("a", State.READY)
        assert "a" in counts_of(there).models
        await there.registry.remove("a")
        for _ in range(20):
            await there.tick()
        assert counts_of(there).models == {}


@pytest.mark.asyncio
async def test_looks_that_fail_are_counted_also_while_none_succeeds() -> None:
    async with world() as there:
        looks = sum(counts_of(there).looks.counts)
        await there.tick(3)
        assert sum(counts_of(there).looks.counts) == looks + 3
        there.gpus.error = RuntimeError("a bug")
        running = asyncio.ensure_future(there.loop.run())
        try:
            await eventually(lambda: counts_of(there).loop_errors > 0, "an error is counted")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert sum(counts_of(there).looks.counts) == looks + 3
