"""Many models in one change of the state file: all or none, and what belongs to each."""

from pathlib import Path

import pytest

from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import StoreError
from orchestrator.policy.key import Used
from orchestrator.policy.model import ModelSpec

pytestmark = pytest.mark.asyncio


def spec(name: str, **fields: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "source": "/m", **fields})


async def test_models_are_put_and_removed_together_and_keep_their_place_and_their_hold(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.open()
    try:
        for at, name in enumerate(("z", "a", "gone")):
            await store.put_model(spec(name), float(at))
            await store.set_held(name, True)
            await store.set_overrides(name, {"priority": 1})
        await store.set_held("new", True)  # of one that was in a config file once
        await store.change_models([spec("new"), spec("z", kv_weight=2)], ["gone"], 9.0)
        stored = await store.load()
        assert [(model.name, model.kv_weight) for model in stored.models] == [("z", 2.0), ("a", 1.0), ("new", 1.0)]
        assert (set(stored.held), set(stored.overrides)) == ({"z", "a"}, {"a"})
    finally:
        await store.close()


async def test_where_one_can_not_be_written_none_is(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.open()
    try:
        await store.put_model(spec("a"), 1.0)
        (tmp_path / "state.db").rename(tmp_path / "elsewhere.db")
        with pytest.raises(StoreError):
            await store.change_models([spec("b")], ["a"], 2.0)
        (tmp_path / "elsewhere.db").rename(tmp_path / "state.db")
        assert (await store.load()).models == (spec("a"),)
    finally:
        await store.close()


async def test_usage_of_more_than_thirteen_months_ago_goes(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.open()
    try:
        for day in ("2026-01-01", "2026-02-10", "2027-02-09"):
            await store.add_usage([(Used("ci", "a", 1, 10, 5), day)], {})
        assert await store.usage() == [Used("ci", "a", 2, 20, 10)]
        assert await store.usage(since="2026-06-01") == [Used("ci", "a", 1, 10, 5)]
    finally:
        await store.close()
