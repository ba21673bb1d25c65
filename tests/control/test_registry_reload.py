"""The config files read anew: what is the same keeps all that is known of it, what cannot work changes nothing."""

import pytest

from orchestrator.errors import SpecError, StoreError
from orchestrator.policy.lifecycle import Rules, Want
from orchestrator.policy.units import GIB, MIB
from tests.control.fakes import FakeStore, spec
from tests.control.shelf import CARDS, Shelf

pytestmark = pytest.mark.asyncio

NEVER = -1e9


async def test_an_unchanged_model_is_the_same_object_with_all_that_was_done_to_it() -> None:
    shelf = await Shelf(spec("a"), spec("b")).load()
    shelf.registry.want("a")
    shelf.registry.rest("b", Want.ASLEEP)
    before = dict(shelf.registry.known())
    told = await shelf.registry.reload([spec("a"), spec("b")], CARDS)
    assert (told.added, told.changed, told.removed, told.unchanged) == ((), {}, (), 2)
    assert all(shelf.registry.known()[name] is before[name] for name in ("a", "b"))


async def test_added_changed_and_removed_and_their_names() -> None:
    shelf = await Shelf(spec("a", aliases=["x"]), spec("gone", aliases=["y"])).load()
    shelf.registry.want("a")
    at = shelf.registry.get("a").started_at
    told = await shelf.registry.reload([spec("a", aliases=["z"], kv_weight=2), spec("new", aliases=["x"], preload=True)], CARDS)
    assert (told.added, told.changed, told.removed, told.unchanged) == (("new",), {"a": ("aliases", "kv_weight")}, ("gone",), 0)
    assert {name: shelf.registry.resolve(name) for name in ("x", "z")} == {"x": "new", "z": "a"}
    assert (shelf.registry.get("a").started_at, shelf.registry.get("new").started_at) == (at, shelf.clock.now)
    with pytest.raises(Exception, match="does not exist"):
        shelf.registry.resolve("y")


async def test_what_operators_changed_stays_and_a_hold_too() -> None:
    shelf = await Shelf(spec("a")).load()
    await shelf.limit("a", kv_floor=256 * MIB)
    await shelf.registry.hold("a", True)
    await shelf.registry.reload([spec("a", preload=True)], CARDS)
    model = shelf.registry.get("a")
    assert (model.spec.kv_floor, model.spec.preload, model.held, model.started_at) == (256 * MIB, True, True, NEVER)
    await shelf.limit("a", kv_floor=None)
    assert shelf.registry.get("a").spec == spec("a", preload=True)


async def test_preload_that_is_new_starts_it() -> None:
    shelf = await Shelf(spec("a")).load()
    await shelf.registry.reload([spec("a", preload=True)], CARDS)
    assert shelf.registry.get("a").started_at == shelf.clock.now


async def test_a_model_that_cannot_work_refuses_all_and_names_each_fault() -> None:
    shelf = await Shelf(spec("a"), spec("b")).load()
    before = dict(shelf.registry.known())
    with pytest.raises(SpecError) as refused:
        await shelf.registry.reload([spec("a", engine="none"), spec("new", gpus=[7])], CARDS)
    assert sorted(problem.where for problem in refused.value.problems) == ["models.a.engine", "models.new.gpus"]
    assert shelf.registry.known() == before
    assert (await shelf.registry.reload([spec("a"), spec("b")], CARDS)).unchanged == 2


async def test_a_state_file_that_cannot_be_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = await Shelf(spec("a")).load()

    async def broken() -> None:
        raise StoreError("state.db: disk I/O error")

    monkeypatch.setattr(shelf.store, "load", broken)
    with pytest.raises(StoreError):
        await shelf.registry.reload([], CARDS)
    assert set(shelf.registry.known()) == {"a"}


async def test_a_file_takes_a_name_from_the_api_and_gives_it_back() -> None:
    shelf = await Shelf(store=FakeStore(models={"a": spec("a", priority=2)})).load()
    told = await shelf.registry.reload([spec("a")], CARDS)
    assert told.changed == {"a": ("priority", "owner")}
    assert (shelf.registry.get("a").owner, shelf.registry.overruled) == ("file", ["a"])
    told = await shelf.registry.reload([], CARDS)
    assert (told.changed, told.removed) == ({"a": ("priority", "owner")}, ())
    assert (shelf.registry.get("a").owner, shelf.registry.get("a").spec.priority, shelf.registry.overruled) == ("api", 2, [])


async def test_new_rules_are_those_that_a_spec_is_held_against() -> None:
    shelf = await Shelf().load()
    shelf.registry.heed(Rules(reserve_bytes=80 * GIB))
    with pytest.raises(SpecError, match="can never fit"):
        await shelf.add(spec("a"))
