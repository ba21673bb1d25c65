"""Desired state: all models of the API at once, whole or not at all, and who is as desired does not notice."""

import asyncio

import pytest

from orchestrator.errors import SpecError, StoreError
from orchestrator.policy.actions import Learn
from orchestrator.policy.units import MIB
from tests.control.fakes import FakeStore, spec
from tests.control.shelf import CARDS, Shelf

pytestmark = pytest.mark.asyncio

NEVER = -1e9


async def shelf_of(*names: str, store: FakeStore | None = None) -> Shelf:
    """Models of the API, and one of a config file."""
    shelf = await Shelf(spec("file", aliases=["f"]), store=store).load()
    for name in names:
        await shelf.add(spec(name), start=False)
    return shelf


async def test_added_changed_unchanged_and_only_with_prune_removed() -> None:
    shelf = await shelf_of("a", "b", "c")
    before = dict(shelf.registry.known())
    told = await shelf.registry.apply([spec("a"), spec("b", kv_weight=2), spec("new", preload=True)], False, CARDS)
    assert ([each.name for each in told.added], told.removed, told.unchanged) == (["new"], (), ("a",))
    assert told.changed == ((spec("b"), spec("b", kv_weight=2)),)
    assert shelf.registry.known()["a"] is before["a"]
    assert shelf.registry.known().keys() == {"file", "a", "b", "c", "new"}
    assert (shelf.registry.get("new").started_at, shelf.registry.get("new").owner) == (shelf.clock.now, "api")
    told = await shelf.registry.apply([spec("a")], True, CARDS)
    assert sorted(each.name for each in told.removed) == ["b", "c", "new"]
    assert shelf.registry.known().keys() == {"file", "a"}
    assert shelf.store.models == {"a": spec("a")}


async def test_a_dry_run_tells_the_same_and_does_nothing() -> None:
    shelf = await shelf_of("a", "b")
    before = dict(shelf.registry.known())
    desired = [spec("a", priority=3), spec("new")]
    dry = await shelf.registry.apply(desired, True, CARDS, dry_run=True)
    assert (dict(shelf.registry.known()), set(shelf.store.models)) == (before, {"a", "b"})
    assert await shelf.registry.apply(desired, True, CARDS) == dry


async def test_what_was_changed_at_runtime_is_a_difference_and_a_hold_stays() -> None:
    shelf = await shelf_of("a", "b")
    await shelf.limit("a", kv_floor=256 * MIB)
    await shelf.registry.hold("a", True)
    same = spec("a", kv_floor=256 * MIB)
    assert (await shelf.registry.apply([same], False, CARDS)).unchanged == ("a",)
    assert shelf.store.overrides["a"] == {"kv_floor": 256 * MIB}  # as it is: nothing was written
    assert (await shelf.registry.apply([spec("a")], False, CARDS)).changed == ((same, spec("a")),)
    model = shelf.registry.get("a")
    assert (model.spec, dict(model.overrides), model.held, shelf.store.held, shelf.store.overrides) == (spec("a"), {}, True, {"a"}, {})


async def test_one_fault_and_nothing_changes() -> None:
    shelf = await shelf_of("a", "b")
    before, stored = dict(shelf.registry.known()), dict(shelf.store.models)
    desired = [spec("a", gpus=[7]), spec("b", engine="none"), spec("new"), spec("file")]
    with pytest.raises(SpecError) as refused:
        await shelf.registry.apply([*desired[:3]], True, CARDS)
    assert sorted(problem.where for problem in refused.value.problems) == ["models.a.gpus", "models.b.engine"]
    with pytest.raises(SpecError, match=r"models\.file: a config file defines it: change it there"):
        await shelf.registry.apply(desired[2:], False, CARDS)
    assert (dict(shelf.registry.known()), shelf.store.models) == (before, stored)


@pytest.mark.parametrize("taken", ["b", "f", "x"])
async def test_a_name_that_another_has_is_refused_whoever_of_them_changes(taken: str) -> None:
    shelf = await shelf_of("a", "b")
    with pytest.raises(SpecError, match=rf"the name '{taken}' is that of the model"):
        await shelf.registry.apply([spec("a", aliases=[taken]), spec("new", aliases=["x"])][:: -1 if taken == "x" else 1], False, CARDS)
    assert shelf.registry.get("b").spec == spec("b")


async def test_names_may_be_exchanged() -> None:
    shelf = await shelf_of()
    await shelf.registry.apply([spec("a", aliases=["x"]), spec("b", aliases=["y"])], False, CARDS)
    await shelf.registry.apply([spec("a", aliases=["y"]), spec("b", aliases=["x"])], False, CARDS)
    assert [shelf.registry.resolve(name) for name in ("x", "y")] == ["b", "a"]


async def test_a_disk_that_takes_nothing_changes_nothing() -> None:
    shelf = await shelf_of("a")
    before, shelf.store.broken = dict(shelf.registry.known()), True
    with pytest.raises(StoreError):
        await shelf.registry.apply([spec("a", priority=1), spec("new")], True, CARDS)
    assert dict(shelf.registry.known()) == before


async def test_what_is_learned_and_asked_for_while_the_disk_writes_is_kept() -> None:
    shelf = await shelf_of("a", "b")
    shelf.store.gate = asyncio.Event()
    applying = asyncio.create_task(shelf.registry.apply([spec("a", priority=1), spec("b")], False, CARDS))
    while not shelf.registry._changing.locked():  # noqa: ASYNC110 (a step of the loop each)
        await asyncio.sleep(0)
    shelf.registry.want("b")
    learning = asyncio.create_task(shelf.registry.learn(Learn("a", spec("a").footprint_key(), {"start_s": 7.0})))
    await asyncio.sleep(0)
    shelf.store.gate.set()
    await asyncio.gather(applying, learning)
    assert (shelf.registry.get("b").started_at, shelf.registry.get("a").footprint.start_s) == (shelf.clock.now, 7.0)
    assert shelf.registry.get("a").spec.priority == 1
