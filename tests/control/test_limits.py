"""A model's limit while it runs: operators change its bounds, requests need more than it has, idle engines give back, segments vanish."""

import pytest

from orchestrator.control import traffic
from orchestrator.control.traffic import Ask
from orchestrator.errors import SpecError
from orchestrator.policy.decide import PoolView
from orchestrator.policy.instance import State
from orchestrator.policy.snapshot import Segment
from orchestrator.policy.units import GIB
from tests.control.fakes import BUNDLE, CARD, FakeGpus, spec
from tests.control.world import World, world
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


def pool(w: World, model: str) -> PoolView:
    assert w.loop.view is not None
    return w.loop.view.plan.pools[w.engines[model].launch.id]


def segment(w: World, model: str) -> Segment:
    found = w.engines[model].segment
    assert found is not None
    return found


# ---- operators change bounds ----------------------------------------------------------------------------------------


async def test_a_ceiling_and_a_floor_hold_at_once_and_in_the_same_engine() -> None:
    async with world(spec("a"), spec("b")) as w:
        for name in ("a", "b"):
            await (await w.ready(name)).finish()
        await w.tick(20)
        launch = w.engines["a"].launch.id
        await w.limit("a", kv_ceiling="2GiB")
        await w.tick(4)
        assert segment(w, "a").limit_bytes == 2 * GIB // BUNDLE * BUNDLE
        await w.limit("a", kv_ceiling=None, kv_floor="60GiB")
        await w.tick(12)
        assert pool(w, "a").floor_bytes == 60 * GIB
        assert segment(w, "a").limit_bytes >= 60 * GIB
        assert segment(w, "a").limit_bytes + segment(w, "b").limit_bytes < 77 * GIB
        assert w.engines["a"].launch.id == launch
        assert w.states("a") == ["starting", "ready"]


async def test_a_priority_and_a_weight_move_the_surplus() -> None:
    async with world(spec("a"), spec("b")) as w:
        held = [await w.ready(name) for name in ("a", "b")]
        await w.tick(40)
        assert segment(w, "a").limit_bytes < 1.2 * segment(w, "b").limit_bytes
        await w.limit("a", priority=1, kv_weight=2)
        await w.tick(400)  # nobody needs it, so it moves slowly
        assert pool(w, "a").weight == 4
        assert segment(w, "a").limit_bytes > 3 * segment(w, "b").limit_bytes
        for request in held:
            await request.finish()


async def test_a_refused_change_changes_nothing() -> None:
    async with world(spec("a")) as w:
        await (await w.ready("a")).finish()
        await w.tick(20)
        before = segment(w, "a").limit_bytes
        with pytest.raises(SpecError):
            await w.limit("a", kv_ceiling="96MiB")
        await w.tick(20)
        assert segment(w, "a").limit_bytes == before


# ---- a request needs more than there is -----------------------------------------------------------------------------


async def test_a_request_larger_than_its_limit_has_it_raised_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of 32,000 tokens needs 4 bundles and two to spare; b has all the rest, and gives back as its requests end."""
    monkeypatch.setattr(traffic, "ROOM_S", 3600.0)
    async with world(spec("a", kv_floor=0), spec("b")) as w:
        await (await w.ready("a")).finish()
        busy = await w.ready("b")
        await w.limit("a", kv_ceiling=6 * BUNDLE)
        for _ in range(30):
            w.engines["b"].use(CARD)
            await w.tick()
        assert segment(w, "a").limit_bytes == 2 * BUNDLE
        request = w.request("a", Ask(most=32_000, first=31_000, likely=32_000))
        await w.tick(4)
        assert request.launch_id is None
        assert pool(w, "b").status == "draining"
        w.engines["b"].use(60 * GIB)
        await w.tick(12)
        assert segment(w, "a").limit_bytes == 6 * BUNDLE
        assert pool(w, "a").floor_bytes == 6 * BUNDLE
        assert request.launch_id == w.engines["a"].launch.id
        await request.finish()
        await w.tick(20)
        assert pool(w, "a").floor_bytes == 2 * BUNDLE  # only for as long as the request was there
        await busy.finish()


async def test_a_door_says_what_fits_only_once_the_engine_has_taken_the_limit() -> None:
    async with world(spec("a", kv_floor=0)) as w:
        await (await w.ready("a")).finish()
        await w.tick(8)
        assert w.traffic.doors["a"].fitting_tokens is None
        engine = w.engines["a"]
        await w.limit("a", kv_ceiling=6 * BUNDLE)
        await w.tick(4)
        fitting = w.traffic.doors["a"].fitting_tokens
        assert fitting is not None
        assert 30_000 < fitting < 32_768  # 4 bundles of 8192 tokens, less a block
        engine.stuck = True  # it does not take what is written from here on
        await w.limit("a", kv_ceiling=None)
        await w.tick(12)
        assert segment(w, "a").limit_bytes > GIB
        assert w.traffic.doors["a"].fitting_tokens == fitting
        assert pool(w, "a").status == "unverified"
        engine.stuck = False
        await w.tick(2)
        assert w.traffic.doors["a"].fitting_tokens is None


# ---- idle engines give back -----------------------------------------------------------------------------------------


async def test_an_idle_engine_gives_back_once_in_each_idle_period() -> None:
    async with world(spec("a"), spec("kept", idle_trim=None)) as w:
        held = [await w.ready(name) for name in ("kept", "a")]
        await w.tick(20)
        w.journal.clear()
        for request in held:
            w.engines.all[request.launch_id or ""].use(20 * BUNDLE)
            await request.finish()
        await w.tick(36)
        assert not [line for line in w.journal if line.startswith("trim")]
        await w.tick(44)
        assert [line for line in w.journal if line.startswith("trim")] == ["trim a"]
        assert segment(w, "a").mapped_bytes == BUNDLE
        assert segment(w, "kept").used_bytes == 20 * BUNDLE
        await (await w.ready("a")).finish()
        await w.tick(80)
        assert w.journal.count("trim a") == 2
        assert w.journal.count("trim kept") == 0


async def test_one_that_works_is_never_trimmed() -> None:
    async with world(spec("a", idle_trim="1s")) as w:
        request = await w.ready("a")
        await w.tick(80)
        assert "trim a" not in w.journal
        await request.finish()
        await w.tick(8)
        assert "trim a" in w.journal


async def test_where_somebody_lacks_memory_it_gives_back_at_once() -> None:
    async with world(spec("idle", idle_trim="1h"), spec("busy")) as w:
        request = await w.ready("idle")
        w.engines["idle"].use(30 * GIB)
        await request.finish()
        held = await w.ready("busy")
        for _ in range(12):
            w.engines["busy"].use(60 * GIB)
            await w.tick()
        assert "trim idle" in w.journal
        assert segment(w, "idle").mapped_bytes == BUNDLE
        await held.finish()


# ---- segments vanish ------------------------------------------------------------------------------------------------


async def test_a_segment_that_somebody_removed_is_made_anew_and_requests_go_on() -> None:
    async with world(spec("a")) as w:
        held = await w.ready("a")
        await w.tick(8)
        before = segment(w, "a").limit_bytes
        w.engines["a"].hidden = True
        await w.tick()
        assert w.instance("a").state is State.READY
        request = w.request("a")
        await turns()
        assert request.launch_id == w.engines["a"].launch.id
        await w.tick(2)
        assert w.journal.count("repair a") == 1
        assert not w.engines["a"].hidden
        await w.tick(8)
        assert segment(w, "a").limit_bytes == before
        assert pool(w, "a").status == "applied"
        for each in (held, request):
            await each.finish()


async def test_what_an_engine_without_a_segment_holds_is_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with its memory and its limit, however long it takes to make its segment anew."""
    async with world(spec("a"), spec("b"), gpus=FakeGpus(total_bytes=40 * GIB)) as w:
        held = [await w.ready(name) for name in ("a", "b")]
        await w.tick(40)
        w.engines["a"].use(4 * GIB)
        await w.tick(40)
        a, b, mapped = segment(w, "a").limit_bytes, segment(w, "b").limit_bytes, segment(w, "a").mapped_bytes
        with monkeypatch.context() as broken:
            broken.setattr(w.engines, "repair", lambda launch_id: None)
            w.engines["a"].hidden = True
            w.engines["b"].use(b)  # and wants more
            for _ in range(20):
                await w.tick()
                assert pool(w, "a").charge_bytes >= a
                assert segment(w, "b").limit_bytes + a <= 40 * GIB
                assert segment(w, "b").limit_bytes <= b + 0.03 * 40 * GIB  # what was in hand, and nothing of a's
                assert w.loop.view is not None
                assert w.loop.view.plan.gpus["GPU-0"].kv_mapped_bytes == mapped + segment(w, "b").mapped_bytes
        await w.tick(2)
        assert not w.engines["a"].hidden
        for request in held:
            await request.finish()


async def test_a_segment_that_somebody_zeroed_gets_its_limit_back_and_its_engine_is_not_forgotten() -> None:
    """Its engine goes on with the limit that it had: what it may take is not given to the other meanwhile."""
    async with world(spec("a"), spec("b"), gpus=FakeGpus(total_bytes=40 * GIB)) as w:
        held = [await w.ready(name) for name in ("a", "b")]
        await w.tick(40)
        a, b = segment(w, "a").limit_bytes, segment(w, "b").limit_bytes
        w.engines["a"].segment = Segment(0, 0, 0)
        w.engines["b"].use(b)
        await w.tick()
        assert segment(w, "b").limit_bytes <= b + 0.03 * 40 * GIB  # what was in hand, and nothing of a's
        assert pool(w, "a").charge_bytes >= a
        await w.tick(8)
        assert segment(w, "a").limit_bytes > 0
        for request in held:
            await request.finish()
