"""Where nothing changes the loop looks on and decides now and then; whatever it sees ends that at once."""

from collections.abc import Awaitable, Callable, Mapping

import pytest

from orchestrator.control import calm, reconciler
from orchestrator.control.calm import Calm
from orchestrator.policy import budgets
from orchestrator.policy.decide import Plan, decide
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.snapshot import Snapshot
from orchestrator.policy.units import GIB
from tests.control.fakes import BUNDLE, spec
from tests.control.world import World, world
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which the loop has decided."""
    times: list[float] = []

    def told(known: Mapping[str, Known], instances: Mapping[str, Instance], memory: object, snapshot: Snapshot, *rest: object) -> Plan:
        times.append(snapshot.now)
        return decide(known, instances, memory, snapshot, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reconciler, "decide", told)
    return times


async def resting(w: World, decided: list[float]) -> None:
    """Two models that nobody uses; limits and caches are where they go."""
    for name in ("a", "b"):
        await (await w.ready(name)).finish()
    await w.tick(800)  # and nobody is put to sleep for being idle yet
    decided.clear()
    await w.tick(40)
    assert len(decided) == 10 / calm.DECIDE_S


async def test_in_calm_it_looks_as_often_and_decides_less_often(decided: list[float]) -> None:
    async with world(spec("a"), spec("b")) as w:
        await resting(w, decided)
        reads, looks = w.gpus.reads, w.loop.view.ticks if w.loop.view else 0
        await w.tick(8)
        assert w.gpus.reads == reads + 8
        assert w.loop.view is not None
        assert (w.loop.view.ticks, w.loop.view.snapshot.now) == (looks + 8, w.clock())


async def use(w: World) -> None:
    w.engines["a"].use(4 * BUNDLE)


async def grab(w: World) -> None:
    w.gpus.foreign["GPU-0"] = GIB


async def lose(w: World) -> None:
    w.engines["a"].hidden = True


async def ask(w: World) -> None:
    w.request("b")
    await turns()


async def bound(w: World) -> None:
    await w.limit("a", kv_ceiling="9GiB")


async def hold(w: World) -> None:
    await w.registry.hold("a", True)


async def add(w: World) -> None:
    await w.add("c", start=False)


async def crash(w: World) -> None:
    w.engines.crash("a")


async def fail(w: World) -> None:
    w.gpus.error = OSError("NVML: GPU lost")


async def stop(w: World) -> None:
    w.loop.stop()


@pytest.mark.parametrize("event", [use, grab, lose, ask, bound, hold, add, crash, fail, stop])
async def test_whatever_is_seen_is_decided_at_once_and_for_the_next_seconds(
    event: Callable[[World], Awaitable[None]], decided: list[float]
) -> None:
    async with world(spec("a"), spec("b")) as w:
        await resting(w, decided)
        await w.tick(1)
        decided.clear()
        await event(w)
        for number in range(12):
            await w.tick()
            assert len(decided) == number + 1


async def test_who_has_requests_is_looked_after_every_time(decided: list[float]) -> None:
    async with world(spec("a"), spec("b")) as w:
        await resting(w, decided)
        request = w.request("a")
        await w.tick(40)
        decided.clear()
        await w.tick(20)
        assert len(decided) == 20
        await request.finish()


async def test_a_start_a_wait_and_a_retry_are_no_calm(decided: list[float]) -> None:
    async with world(spec("a"), spec("b", start_timeout=3600)) as w:
        await w.ready("a")
        w.request("b")
        await w.until("b", State.STARTING)
        w.engines["b"].stuck = True
        await w.tick(40)
        decided.clear()
        await w.tick(20)
        assert len(decided) == 20


async def test_what_time_alone_brings_is_hardly_late(decided: list[float]) -> None:
    async with world(spec("a", idle_timeout=100, idle_trim=None)) as w:
        await (await w.ready("a")).finish()
        ready_at = w.clock()
        await w.until("a", State.DRAINING, ticks=500)
        assert 100 <= w.clock() - ready_at <= 100 + calm.DECIDE_S + 2 * 0.25


async def test_a_decision_that_fails_is_made_again(decided: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(spec("a"), spec("b")) as w:
        await resting(w, decided)
        await grab(w)
        with monkeypatch.context() as broken:
            broken.setattr(w.traffic, "publish", lambda doors: 1 / 0)
            for _ in range(3):
                with pytest.raises(ZeroDivisionError):
                    await w.tick()
        decided.clear()
        await w.tick()
        assert len(decided) == 1


async def test_calm_begins_later_than_the_allocators_longest_pause() -> None:
    assert max(budgets.COOL_DOWN_S, budgets.SETTLE_S) < calm.AFTER_S
    assert not Calm().holds({}, Snapshot(1e9, {}, {}, {}))
