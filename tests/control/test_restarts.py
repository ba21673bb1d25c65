"""Engines that die, starts that fail, and daemons that were killed: what comes back by itself, and when it is given up."""

import pytest

from orchestrator.errors import ModelUnavailable
from orchestrator.policy.instance import State
from orchestrator.policy.restart import MAX_FAILURES, STABLE_S
from tests.control.fakes import FakeEngine, spec
from tests.control.world import World, world
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


async def test_a_crash_backs_off_and_the_engine_comes_back() -> None:
    async with world(spec("a")) as w:
        request = await w.ready("a")
        first = w.engines["a"].launch.id
        w.engines.crash("a")
        await w.tick()
        assert w.instance("a").state is State.STOPPING
        assert w.traffic.doors["a"].launch_id is None  # nobody is sent to a dead engine
        backoff = await w.until("a", State.BACKOFF)
        assert backoff.failures == 1
        assert "killed by SIGKILL" in backoff.reason
        waiting = w.request("a")
        await w.until("a", State.READY)
        await turns()
        assert waiting.launch_id == w.engines["a"].launch.id != first
        assert w.engines.forgotten == [first]
        assert w.states("a") == ["starting", "ready", "stopping", "backoff", "starting", "ready"]
        await request.finish()
        await waiting.finish()


async def test_an_engine_that_hangs_is_replaced_and_who_waited_is_served_by_the_next() -> None:
    async with world(spec("a", max_concurrency=1)) as w:
        running = await w.ready("a")
        waiting = w.request("a")
        first = w.engines["a"]
        first.error = "EngineCore hangs"  # its process lives, and its API server says that all is well
        stopping = await w.until("a", State.STOPPING)
        assert stopping.reason == "the engine failed: EngineCore hangs"
        await w.until("a", State.BACKOFF)
        assert waiting.launch_id is None
        assert not waiting.task.done()  # its place in the queue is kept
        await running.cancel()  # as the proxy does when the engine's socket closes
        await w.until("a", State.READY)
        await turns()
        assert waiting.launch_id == w.engines["a"].launch.id != first.launch.id
        await waiting.finish()


async def test_an_engine_that_hangs_again_and_again_is_given_up_and_a_stable_period_forgives() -> None:
    async with world(spec("a", pinned=True, idle_timeout=None)) as w:
        await (await w.ready("a")).finish()
        for hangs in (1, 2):
            await w.until("a", State.READY, ticks=200)
            w.engines["a"].error = "EngineCore hangs"
            assert (await w.until("a", State.BACKOFF)).failures == hangs
        await w.until("a", State.READY, ticks=200)
        await w.tick(2, seconds=STABLE_S)
        assert w.instance("a").failures == 0
        for _ in range(MAX_FAILURES):
            await w.until("a", State.READY, ticks=200)
            w.engines["a"].error = "EngineCore hangs"
            await w.until("a", State.STOPPING)
        failed = await w.until("a", State.FAILED)
        assert failed.reason == ("the engine failed: EngineCore hangs; failed 5 times in a row: mend the cause, then start it by hand")


async def test_a_full_disk_starts_nobody_and_counts_against_nobody() -> None:
    async with world(spec("a"), spec("b")) as w:
        other = await w.ready("b")
        w.engines.disk_full = True
        request = w.request("a")
        for _ in range(2 * MAX_FAILURES):
            backoff = await w.until("a", State.BACKOFF)
            assert (backoff.failures, request.task.done()) == (0, False)
            assert "disk is full; no failure of the engine" in backoff.reason
            assert w.loop.view is not None
            assert ("a", "GPU-0") not in w.loop.view.plan.claims  # others may have its memory meanwhile
            await w.until("a", State.STARTING, ticks=100)
        assert w.instance("b").state is State.READY
        w.engines.disk_full = False
        await w.until("a", State.READY, ticks=200)
        await turns()
        assert request.launch_id == w.engines["a"].launch.id
        await request.finish()
        await other.finish()


async def test_a_start_that_fails_again_and_again_is_given_up_and_an_operator_tries_again() -> None:
    async with world(spec("a")) as w:
        w.engines.fail_next = [("its process exited with code 1", ("CUDA error",))] * MAX_FAILURES
        request = w.request("a")
        failed = await w.until("a", State.FAILED, ticks=2000)
        assert failed.failures == MAX_FAILURES
        assert w.journal.count("start a") == MAX_FAILURES
        await turns()
        with pytest.raises(ModelUnavailable) as refused:
            await request.task
        assert refused.value.code == "model_failed"
        assert "5 times in a row" in refused.value.message

        await w.tick(400)
        assert w.journal.count("start a") == MAX_FAILURES  # it stays given up
        await w.registry.hold("a", False)
        await w.until("a", State.READY)
        assert w.instance("a").failures == 0


async def test_a_mistake_in_the_spec_is_final_at_the_first_start_and_its_log_line_is_told() -> None:
    async with world(spec("a")) as w:
        line = "error: unrecognized arguments: --max-modle-len"
        w.engines.fail_next = [("its process exited with code 2", ("usage: api_server.py", line))]
        w.request("a")
        failed = await w.until("a", State.FAILED)
        assert line in failed.reason
        assert w.journal.count("start a") == 1


async def test_backoff_grows_between_the_attempts() -> None:
    async with world(spec("a", pinned=True)) as w:
        w.engines.fail_next = [("boom", ())] * 3
        w.request("a")
        await w.until("a", State.READY, ticks=200)
        starts = [e for e in w.store.kept if e.kind == "backoff"]
        assert [e.reason.rpartition(" in ")[2] for e in starts] == ["2s", "4s", "8s"]


async def test_not_ready_in_time_is_a_failure_that_says_where_it_was() -> None:
    async with world(spec("a", start_timeout="5s")) as w:
        w.request("a")
        await w.until("a", State.STARTING)
        await w.tick()
        w.engines["a"].stuck = True
        await w.until("a", State.STOPPING)
        assert "not ready after 5s" in w.instance("a").reason
        assert w.engines["a"].phase in w.instance("a").reason


async def leave_running(w: World) -> FakeEngine:
    """What a daemon that was killed leaves: a ready engine and its record."""
    request = await w.ready("a")
    await request.finish()
    return w.engines["a"]


async def test_adoption_goes_on_where_the_former_daemon_was_killed() -> None:
    async with world(spec("a")) as old:
        engine = await leave_running(old)
    async with world(spec("a")) as w:
        w.engines.records = [engine]
        w.loop.adopt(await w.engines.adopt(), w.clock())
        w.clock.now = old.clock.now
        engine.started_at = w.clock.now
        request = w.request("a")
        await w.tick(2)
        assert w.instance("a").state is State.READY
        await turns()
        assert request.launch_id == engine.launch.id
        assert "start a" not in w.journal
        assert w.states("a")[:2] == ["adopted", "ready"]
        assert not w.store.footprints  # how long its start took was not seen
        await request.finish()


async def test_an_adopted_engine_whose_model_is_gone_is_ended() -> None:
    async with world(spec("a")) as old:
        engine = await leave_running(old)
    async with world(spec("b")) as w:
        w.engines.records = [engine]
        w.loop.adopt(await w.engines.adopt(), w.clock())
        await w.tick(6)
        assert w.engines.forgotten == [engine.launch.id]
        assert not w.engines.all


async def test_an_adopted_engine_of_an_older_spec_is_replaced() -> None:
    async with world(spec("a")) as old:
        engine = await leave_running(old)
    async with world(spec("a", args=["--enforce-eager"])) as w:
        w.engines.records = [engine]
        w.loop.adopt(await w.engines.adopt(), w.clock())
        request = w.request("a")
        await w.until("a", State.READY)
        await request.finish()
        await w.until("a", State.STOPPING)
        await w.until("a", State.READY)
        assert w.engines["a"].launch.spec.args == ("--enforce-eager",)
