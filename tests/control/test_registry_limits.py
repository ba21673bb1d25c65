"""Bounds that operators change while a model runs: kept apart from the spec, over restarts, until they are given back."""

import asyncio

import pytest
from pydantic import ValidationError

from orchestrator.errors import ModelNotFound, SpecError, StoreError
from orchestrator.policy.actions import Learn
from orchestrator.policy.units import GIB
from tests.control.fakes import BUNDLE, FakeStore, spec
from tests.control.shelf import CARDS, Shelf
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio

CHANGES = {"kv_floor": "2GiB", "kv_ceiling": "20GiB", "kv_weight": 2.5, "priority": -3}


async def test_changes_are_in_the_spec_at_once_and_kept_apart() -> None:
    written = spec("a", aliases=["x"], priority=1, kv_floor="1GiB")
    shelf = await Shelf(written).load()
    key = shelf.registry.get("a").spec.launch_key()
    await shelf.limit("x", **CHANGES)  # by its alias, as it may be asked for
    known = shelf.registry.get("a")
    assert (known.spec.kv_floor, known.spec.kv_ceiling, known.spec.kv_weight, known.spec.priority) == (2 * GIB, 20 * GIB, 2.5, -3)
    assert known.overrides == CHANGES == shelf.store.overrides["a"]
    assert known.spec.launch_key() == key  # its engine need not start again
    assert known.spec.aliases == ("x",)
    await shelf.limit("a", priority=None, kv_floor=None)
    known = shelf.registry.get("a")
    assert (known.spec.priority, known.spec.kv_floor, known.spec.kv_ceiling) == (1, GIB, 20 * GIB)  # back to the spec
    assert known.overrides == {"kv_ceiling": "20GiB", "kv_weight": 2.5}
    await shelf.limit("a", kv_ceiling=None, kv_weight=None)
    assert shelf.registry.get("a").spec == written
    assert shelf.store.overrides["a"] == {}


@pytest.mark.parametrize("owner", ["file", "api"])
async def test_they_survive_a_restart(owner: str) -> None:
    store = FakeStore() if owner == "file" else FakeStore(models={"a": spec("a")})
    files = [spec("a")] if owner == "file" else []
    await (await Shelf(*files, store=store).load()).limit("a", kv_weight=4, kv_ceiling="20GiB")
    again = await Shelf(*files, store=store).load()
    known = again.registry.get("a")
    assert (known.spec.kv_weight, known.spec.kv_ceiling, known.owner) == (4.0, 20 * GIB, owner)
    assert known.overrides == {"kv_weight": 4, "kv_ceiling": "20GiB"}
    await again.limit("a", kv_weight=None, kv_ceiling=None)
    assert again.registry.get("a").spec == spec("a")
    assert again.registry.dropped == []


async def test_what_no_longer_goes_with_a_changed_file_is_dropped_and_named() -> None:
    store = FakeStore()
    await (await Shelf(spec("a"), spec("b"), store=store).load()).limit("a", kv_ceiling="20GiB")
    again = await Shelf(spec("a", kv_floor="30GiB"), spec("b"), store=store).load()
    assert again.registry.dropped == ["a"]
    known = again.registry.get("a")
    assert (known.spec, known.overrides) == (spec("a", kv_floor="30GiB"), {})
    back = await Shelf(spec("a"), spec("b"), store=store).load()
    assert back.registry.get("a").spec.kv_ceiling == 20 * GIB  # and not lost, if the file is changed back


async def test_a_namesake_that_is_added_later_does_not_inherit_them() -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a"))
    await shelf.limit("a", kv_weight=4)
    await shelf.registry.remove("a")
    assert shelf.store.overrides == {}
    await shelf.add(spec("a"))
    assert shelf.registry.get("a").overrides == {}

    filed = FakeStore()
    await (await Shelf(spec("f"), store=filed).load()).limit("f", kv_weight=4)
    without = await Shelf(store=filed).load()  # it was taken out of the file
    await without.add(spec("f"))
    again = await Shelf(store=filed).load()
    assert again.registry.get("f").spec == spec("f")


@pytest.mark.parametrize(
    ("changes", "where", "says"),
    [
        ({"args": ["--enforce-eager"]}, "args", "these can: kv_floor, kv_ceiling, kv_weight, priority"),
        ({"name": "b", "idle_timeout": 5}, "idle_timeout", "can not be changed while it runs"),
        ({"kv_ceiling": 2 * BUNDLE}, "kv_ceiling", "one request of 32768 tokens"),
        ({"kv_floor": "79GiB"}, "kv_floor", "can never fit"),
    ],
)
async def test_what_can_not_be_is_refused_with_nothing_changed(changes: dict[str, object], where: str, says: str) -> None:
    shelf = await Shelf(spec("a")).load()
    await shelf.limit("a", priority=1)
    with pytest.raises(SpecError) as error:
        await shelf.registry.limit("a", {"kv_weight": 5, **changes}, CARDS)
    assert where in [problem.where for problem in error.value.problems]
    assert says in error.value.message
    assert shelf.registry.get("a").overrides == {"priority": 1} == shelf.store.overrides["a"]
    assert shelf.registry.get("a").spec == spec("a", priority=1)


@pytest.mark.parametrize(
    "changes", [{"kv_weight": -1}, {"priority": 9}, {"priority": "high"}, {"kv_floor": "2GB"}, {"kv_floor": "2GiB", "kv_ceiling": "1GiB"}]
)
async def test_values_are_checked_as_in_a_spec_and_against_what_was_changed_before(changes: dict[str, object]) -> None:
    shelf = await Shelf(spec("a")).load()
    with pytest.raises(ValidationError):
        await shelf.limit("a", **changes)
    assert (shelf.registry.get("a").spec, shelf.store.overrides) == (spec("a"), {})
    await shelf.limit("a", kv_floor="10GiB")
    with pytest.raises(ValidationError, match="above kv_ceiling"):
        await shelf.limit("a", kv_ceiling="9GiB")
    with pytest.raises(ModelNotFound):
        await shelf.limit("nobody", priority=1)


async def test_a_store_that_fails_changes_nothing() -> None:
    shelf = await Shelf(spec("a")).load()
    shelf.store.broken = True
    with pytest.raises(StoreError):
        await shelf.limit("a", priority=1)
    assert shelf.registry.get("a").spec == spec("a")
    shelf.store.broken = False
    await shelf.limit("a", priority=1)
    assert shelf.registry.get("a").spec.priority == 1


async def test_they_are_durable_before_they_are_seen_and_nothing_learned_meanwhile_is_lost() -> None:
    shelf = await Shelf(spec("a")).load()
    shelf.store.gate = asyncio.Event()
    change = asyncio.ensure_future(shelf.limit("a", priority=1))
    await turns()
    assert shelf.registry.get("a").spec.priority == 0
    learning = asyncio.ensure_future(
        shelf.registry.learn(Learn("a", spec("a").footprint_key(), {"start_bytes": 5 * GIB, "ready_bytes": 3 * GIB, "start_s": 24.0}))
    )
    held = asyncio.ensure_future(shelf.registry.hold("a", True))
    await turns()
    shelf.store.gate.set()
    await asyncio.gather(change, learning, held)
    known = shelf.registry.get("a")
    assert (known.spec.priority, known.footprint.source, known.held) == (1, "learned", True)
