"""Which models there should be: names are unique, a change is durable before it is seen, one that fails leaves nothing behind."""

import asyncio

import pytest

from orchestrator.control.registry import Registry
from orchestrator.errors import Conflict, ModelNotFound, SpecError, StoreError
from orchestrator.policy.actions import Learn
from orchestrator.policy.footprint import GRAPH_BYTES
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import GIB, MIB
from orchestrator.settings import Engine
from tests.control.fakes import BUNDLE, SHAPE, FakeSources, FakeStore, spec
from tests.control.shelf import Shelf
from tests.support.eventually import turns

pytestmark = pytest.mark.asyncio

NEVER = -1e9


async def test_what_the_files_and_the_store_hold_is_known() -> None:
    store = FakeStore(models={"s": spec("s", aliases=["s2"])}, held={"s"})
    shelf = await Shelf(spec("f", preload=True), store=store).load()
    known = shelf.registry.known()
    assert {name: (k.owner, k.held, k.started_at) for name, k in known.items()} == {
        "f": ("file", False, shelf.clock.now),
        "s": ("api", True, NEVER),
    }
    assert shelf.registry.resolve("s2") == "s"


async def test_a_held_model_is_not_preloaded() -> None:
    shelf = await Shelf(spec("f", preload=True), store=FakeStore(held={"f"})).load()
    assert shelf.registry.get("f").started_at == NEVER


@pytest.mark.parametrize(
    ("filed", "stored"),
    [({"name": "a"}, {"name": "a"}), ({"name": "b", "aliases": ["a"]}, {"name": "a"}), ({"name": "b"}, {"name": "a", "aliases": ["b"]})],
)
async def test_a_file_wins_over_the_api(filed: dict[str, object], stored: dict[str, object]) -> None:
    by_api = ModelSpec.model_validate({"source": "/models/other", **stored})
    by_file = ModelSpec.model_validate({"source": "/models/small", **filed})
    shelf = await Shelf(by_file, store=FakeStore(models={by_api.name: by_api})).load()
    assert [k.spec for k in shelf.registry.known().values()] == [by_file]
    assert shelf.registry.overruled == [by_api.name]
    assert shelf.registry.get(by_file.name).owner == "file"


async def test_an_added_model_is_kept_and_started() -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", aliases=["x", "y"]))
    assert shelf.store.models == {"a": spec("a", aliases=["x", "y"])}
    assert shelf.registry.resolve("y") == "a"
    known = shelf.registry.get("x")
    assert (known.owner, known.started_at, known.footprint.bundle_bytes) == ("api", shelf.clock.now, BUNDLE)
    await shelf.add(spec("b"), start=False)
    assert shelf.registry.get("b").started_at == NEVER


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"name": "a"}, "'a' is a model that is registered already"),
        ({"name": "x"}, "'x' is an alias of 'a'"),
        ({"name": "new", "aliases": ["a"]}, "'a' is a model"),
        ({"name": "new", "aliases": ["fine", "x"]}, "'x' is an alias of 'a'"),
        ({"name": "new", "aliases": ["sql"]}, "'sql' is an adapter of 'a'"),
        ({"name": "new", "adapters": {"x": "org/x"}}, "'x' is an alias of 'a'"),
    ],
)
async def test_names_and_aliases_are_unique(fields: dict[str, object], what: str) -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", aliases=["x"], adapters={"sql": "org/sql"}))
    with pytest.raises(Conflict, match=what) as error:
        await shelf.add(ModelSpec.model_validate({"source": "/models/small", **fields}))
    assert "orchestratorctl rm a" in error.value.message
    assert set(shelf.store.models) == {"a"} == set(shelf.registry.known())


async def test_a_name_of_a_file_is_refused_as_such() -> None:
    shelf = await Shelf(spec("f")).load()
    with pytest.raises(Conflict, match="in a config file"):
        await shelf.add(spec("f"))


@pytest.mark.parametrize("second", [{"name": "a"}, {"name": "b", "aliases": ["a"]}])
async def test_of_two_adds_of_one_name_at_once_one_wins(second: dict[str, object]) -> None:
    shelf = await Shelf().load()
    shelf.store.gate = asyncio.Event()
    adds = [
        asyncio.ensure_future(shelf.add(spec("a", kv_weight=1))),
        asyncio.ensure_future(shelf.add(ModelSpec.model_validate({"source": "/models/small", "kv_weight": 2, **second}))),
    ]
    await turns()
    assert not shelf.registry.known()  # not visible before it is durable
    shelf.store.gate.set()
    done = await asyncio.gather(*adds, return_exceptions=True)
    assert [type(result) for result in done] == [type(None), Conflict]
    assert shelf.store.models == {"a": spec("a", kv_weight=1)}
    assert shelf.registry.get("a").spec == shelf.store.models["a"]


async def test_add_and_remove_at_once_end_in_one_order() -> None:
    shelf = await Shelf().load()
    shelf.store.gate = asyncio.Event()
    add = asyncio.ensure_future(shelf.add(spec("a")))
    await turns()
    remove = asyncio.ensure_future(shelf.registry.remove("a"))
    await turns()
    shelf.store.gate.set()
    await asyncio.gather(add, remove)
    assert not shelf.store.models
    assert not shelf.registry.known()


async def test_a_store_that_fails_leaves_nothing_behind() -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", aliases=["x"]))
    shelf.store.broken = True
    before = dict(shelf.registry.known())
    with pytest.raises(StoreError):
        await shelf.add(spec("b", aliases=["y"]))
    with pytest.raises(StoreError):
        await shelf.registry.remove("a")
    with pytest.raises(StoreError):
        await shelf.registry.hold("a", True)
    assert shelf.registry.known() == before
    assert shelf.registry.resolve("x") == "a"
    for name in ("b", "y"):
        with pytest.raises(ModelNotFound):
            shelf.registry.resolve(name)
    shelf.store.broken = False
    await shelf.add(spec("b", aliases=["y"]))  # and the lock is free


async def test_a_client_that_leaves_during_an_add_leaves_the_registry_usable() -> None:
    shelf = await Shelf().load()
    shelf.store.gate = asyncio.Event()
    add = asyncio.ensure_future(shelf.add(spec("a")))
    await turns()
    add.cancel()
    await asyncio.gather(add, return_exceptions=True)
    shelf.store.gate = None
    await shelf.add(spec("b"))
    assert set(shelf.registry.known()) == {"b"}


async def test_removal_frees_the_name_and_its_aliases() -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", aliases=["x"]))
    await shelf.registry.remove("x")  # by its alias, as it may be asked for
    assert not shelf.store.models
    await shelf.add(spec("x", aliases=["a"]))
    assert shelf.registry.resolve("a") == "x"


async def test_removal_of_what_is_not_there_or_belongs_to_people() -> None:
    shelf = await Shelf(spec("f")).load()
    with pytest.raises(ModelNotFound):
        await shelf.registry.remove("nobody")
    with pytest.raises(Conflict, match="config file: remove it there"):
        await shelf.registry.remove("f")
    assert set(shelf.registry.known()) == {"f"}


async def test_an_unknown_name_lists_what_there_is_and_the_nearest() -> None:
    shelf = await Shelf(spec("qwen-7b"), spec("llama")).load()
    with pytest.raises(ModelNotFound) as error:
        shelf.registry.resolve("qwen-8b")
    assert "Did you mean 'qwen-7b'?" in error.value.message
    assert "llama, qwen-7b" in error.value.message
    with pytest.raises(ModelNotFound, match="add-model"):
        (await Shelf().load()).registry.resolve("a")
    with pytest.raises(ModelNotFound, match=r"Known models: m100, .*, m119 and 180 more$"):
        (await Shelf(*(spec(f"m{number}") for number in range(100, 300))).load()).registry.resolve("other")


async def test_hold_and_start() -> None:
    shelf = await Shelf(spec("f")).load()
    await shelf.registry.hold("f", True)
    assert (shelf.registry.get("f").held, shelf.store.held) == (True, {"f"})
    shelf.clock.now += 10
    await shelf.registry.hold("f", False)
    known = shelf.registry.get("f")
    assert (known.held, known.started_at, shelf.store.held) == (False, shelf.clock.now, set())


def learn(of: ModelSpec, start_bytes: int = 5 * GIB, ready_bytes: int = 3 * GIB) -> Learn:
    return Learn(of.name, of.footprint_key(), {"start_bytes": start_bytes, "ready_bytes": ready_bytes, "start_s": 24.0})


async def test_learned_figures_are_for_every_model_that_is_started_alike() -> None:
    shelf = await Shelf(spec("a"), spec("same", priority=3), spec("other", args=["--enforce-eager"])).load()
    await shelf.registry.learn(learn(spec("a")))
    sources = {name: known.footprint.source for name, known in shelf.registry.known().items()}
    assert sources == {"a": "learned", "same": "learned", "other": "estimated"}
    footprint = shelf.registry.get("same").footprint
    assert (footprint.start_bytes, footprint.ready_bytes, footprint.start_s) == (5 * GIB, 3 * GIB, 24.0)
    assert footprint.bundle_bytes == BUNDLE  # what the folder says of the KV geometry stays
    await shelf.add(spec("late"))
    assert shelf.registry.get("late").footprint.source == "learned"


async def test_arguments_of_an_engine_venv_count_as_those_of_the_spec() -> None:
    def registry(*args: str) -> Registry:
        files = (spec("a"), spec("b", args=["--max-model-len", "2048"]))
        return Registry(store, FakeSources(), files, {"default": Engine(args=args)}, Rules())

    store = FakeStore()
    plain, eager = registry(), registry("--enforce-eager", "--max-model-len=4096")
    await plain.load()
    await eager.load()
    assert plain.get("a").footprint.start_bytes - eager.get("a").footprint.start_bytes == GRAPH_BYTES
    assert [plain.get("a").footprint.max_model_len, eager.get("a").footprint.max_model_len] == [32768, 4096]
    assert eager.get("b").footprint.max_model_len == 2048, "what its spec says comes later, and wins"
    await eager.learn(learn(spec("a")))
    for args, source in ((("--enforce-eager", "--max-model-len=4096"), "learned"), ((), "estimated"), (("--enforce-eager",), "estimated")):
        again = registry(*args)
        await again.load()
        assert again.get("a").footprint.source == source, args


async def test_learned_figures_survive_a_restart() -> None:
    shelf = await Shelf(spec("a")).load()
    await shelf.registry.learn(learn(spec("a")))
    again = await Shelf(spec("a"), store=shelf.store).load()
    assert again.registry.get("a").footprint == shelf.registry.get("a").footprint


@pytest.mark.parametrize("what", ["hold", "add"])
async def test_what_is_learned_while_a_change_is_being_written_is_not_lost(what: str) -> None:
    shelf = await Shelf(spec("a")).load()
    shelf.store.gate = asyncio.Event()
    change = asyncio.ensure_future(shelf.registry.hold("a", True) if what == "hold" else shelf.add(spec("late")))
    await turns()
    learning = asyncio.ensure_future(shelf.registry.learn(learn(spec("a"))))
    await turns()
    shelf.store.gate.set()
    await asyncio.gather(change, learning)
    assert {known.footprint.source for known in shelf.registry.known().values()} == {"learned"}


async def test_sources_that_are_away_are_told_and_not_refused_at_start() -> None:
    shelf = Shelf(spec("f"))
    shelf.sources.bad["/models/small"] = "there is no folder"
    await shelf.load()
    assert [str(problem) for problem in shelf.registry.source_problems()] == ["models.f.source: there is no folder"]
    assert SHAPE.layers * 2 * 2 * MIB == BUNDLE


async def test_adapters_come_and_go_at_runtime() -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", adapters={"sql": "org/sql"}))
    before = shelf.registry.get("a").spec
    await shelf.registry.adapt("a", {"fr": "org/fr", "sql": "org/sql-2"}, [])
    now = shelf.registry.get("a").spec
    assert now.adapters == {"sql": "org/sql-2", "fr": "org/fr"}
    assert (shelf.registry.resolve("fr"), now.served_by(before)) == ("a", False)  # so its engine is drained, and replaced
    await shelf.registry.adapt("sql", {"fr": None}, [])
    with pytest.raises(ModelNotFound):
        shelf.registry.resolve("fr")
    await shelf.registry.adapt("a", {"sql": "org/sql"}, [])
    assert (shelf.registry.get("a").spec, shelf.store.overrides["a"]) == (before, {})  # as its spec has it: nothing is kept


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"b": "org/x"}, Conflict, "'b' is a model"),
        ({"a": "org/x"}, SpecError, "is a name of the model itself"),
        ({"no way": "org/x"}, SpecError, "is not a name"),
        ({"fr": None}, ModelNotFound, "has no adapter 'fr'; it has: sql"),
    ],
)
async def test_an_adapter_that_can_not_be_changes_nothing(changes: dict[str, str | None], error: type[Exception], words: str) -> None:
    shelf = await Shelf().load()
    await shelf.add(spec("a", adapters={"sql": "org/sql"}))
    await shelf.add(spec("b"))
    with pytest.raises(error, match=words):
        await shelf.registry.adapt("a", {"new": "org/new", **changes}, [])
    assert shelf.registry.get("a").spec.adapters == {"sql": "org/sql"}
    assert shelf.store.overrides.get("a", {}) == {}
