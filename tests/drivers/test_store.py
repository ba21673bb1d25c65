"""The state file, as a real SQLite file: what was acknowledged is there after a reopen, a kill -9 and a full disk."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.keys import Keys
from orchestrator.control.ledger import SHOWN, Ledger
from orchestrator.drivers import store as driver
from orchestrator.drivers.store import SqliteStore
from orchestrator.drivers.store_file import MIGRATIONS
from orchestrator.errors import StoreError
from orchestrator.policy.key import KeySpec, StoredKey, Used
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.stored import Event, Stored
from tests.support.stored import opened

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]
FIRST_SPEC = (  # as the first version wrote it, which did not know of every field of today
    '{"name":"a","source":"/models/a","aliases":[],"gpus":"auto","tensor_parallel_size":1,"args":[],"env":{},"engine":"default",'
    '"kv_floor":null,"kv_ceiling":null,"kv_weight":1.0,"priority":2,"pinned":false,"preload":false,"idle_timeout":1800.0,'
    '"start_timeout":600.0,"max_concurrency":256,"max_queue":512}'
)


def spec(name: str = "a", **fields: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "source": "/models/a", **fields})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


async def test_everything_survives_a_reopen(path: Path) -> None:
    full = spec(
        "org/b", aliases=["x"], gpus=[0, "GPU-1"], args=["--max-model-len", "8k"], env={"A": "ü\n"}, kv_floor="1GiB", kv_ceiling="2GiB",
        idle_timeout=None, priority=-3, pinned=True,
    )  # fmt: skip
    events = [Event(float(n), "a" if n % 2 else "b", "ready", f"reason {n}") for n in range(6)]
    async with opened(path) as store:
        assert await store.load() == Stored()
        await store.put_model(full, 2.0)
        await store.put_model(spec("a"), 1.0)
        await store.set_held("a", True)
        await store.set_held("a", True)  # again is harmless
        await store.set_overrides("a", {"kv_weight": 2.0})
        await store.set_overrides("a", {"kv_floor": "2GiB", "priority": -1})
        await store.set_overrides("of a file", {})
        await store.put_footprint("key", {"start_bytes": 5, "start_s": 1.5})
        await store.put_footprint("key", {"start_bytes": 6, "start_s": 2.5})
        await store.put_engine("l1", {"process": None})
        await store.put_engine("l1", {"process": [1, 2.25], "log": "/x"})
        await store.put_engine("l2", {})
        await store.remove_engine("l2")
        await store.add_events(events)
    async with opened(path) as store:
        overrides = {"a": {"kv_floor": "2GiB", "priority": -1}, "of a file": {}}
        footprints = {"key": {"start_bytes": 6, "start_s": 2.5}}
        assert await store.load() == Stored((spec("a"), full), frozenset({"a"}), overrides, footprints)
        assert await store.engines() == {"l1": {"process": [1, 2.25], "log": "/x"}}
        assert await store.events(None, 100) == events
        assert await store.events(None, 2) == events[-2:]
        assert await store.events("a", 2) == [events[3], events[5]]
        assert await store.events("nobody", 2) == []


async def test_removal_forgets_that_it_was_held_and_what_was_changed(path: Path) -> None:
    async with opened(path) as store:
        await store.put_model(spec("a"), 1.0)
        await store.set_held("a", True)
        await store.set_overrides("a", {"priority": 1})
        await store.remove_model("a")
        await store.put_model(spec("a"), 2.0)
        assert await store.load() == Stored((spec("a"),))
        await store.set_held("a", True)
        await store.set_held("a", False)
        assert (await store.load()).held == frozenset()


async def test_a_model_that_a_config_file_had_overruled_can_be_added_anew(path: Path) -> None:
    """The registry does not know of the old row then, so nothing else could remove it."""
    async with opened(path) as store:
        await store.put_model(spec("a", aliases=["x"]), 1.0)
        await store.set_held("a", True)
        await store.set_overrides("a", {"priority": 1})
        await store.put_model(spec("a"), 2.0)
        assert await store.load() == Stored((spec("a"),))


async def test_old_events_are_pruned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "KEPT_EVENTS", 50)
    async with opened(path) as store:
        for start in range(0, 200, 20):
            await store.add_events([Event(float(n), "a", "ready", "") for n in range(start, start + 20)])
        kept = await store.events(None, 1000)
        assert [event.at for event in kept] == [float(n) for n in range(150, 200)]
        await store.add_events([])


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    async with opened(path) as store:
        await store.put_model(spec("a"), 1.0)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    store = SqliteStore(path)
    with pytest.raises(StoreError, match=r"newer version.*schema 99.*upgrade the daemon"):
        await store.open()
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM models").fetchone() == (1,)
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


ROWS = (  # of each version, as it wrote them
    (
        f"INSERT INTO models VALUES ('a', '{FIRST_SPEC}', 1.0)",
        "INSERT INTO held VALUES ('a')",
        "INSERT INTO footprints VALUES ('key', '{\"start_bytes\": 6}')",
        "INSERT INTO engines VALUES ('l1', '{\"process\": null}')",
        "INSERT INTO events (at, model, kind, reason) VALUES (1.5, 'a', 'ready', 'why')",
    ),
    ("INSERT INTO overrides VALUES ('a', '{\"priority\": 1}')",),
    (
        "INSERT INTO keys VALUES ('k', '{\"name\": \"k\"}', x'6b', 'sk-k', 5.0, NULL, NULL)",
        "INSERT INTO usage VALUES ('k', 'a', '2027-01-31', 1, 2, 3)",
    ),
)


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
async def test_a_file_of_every_version_is_migrated_and_keeps_its_rows(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        for migration, rows in zip(MIGRATIONS[:version], ROWS[:version], strict=True):
            db.executescript(migration)
            for row in rows:
                db.execute(row)
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    overrides = {"a": {"priority": 1}} if version >= 2 else {}
    used = [Used("k", "a", 1, 2, 3)] if version >= 3 else []
    for _ in range(2):  # the second time nothing is left to migrate
        async with opened(path) as store:
            assert await store.load() == Stored((spec("a", priority=2),), frozenset({"a"}), overrides, {"key": {"start_bytes": 6}})
            assert await store.engines() == {"l1": {"process": None}}
            assert await store.events(None, 9) == [Event(1.5, "a", "ready", "why")]
            assert await store.usage() == used
            assert [key.spec.name for key in (await store.keys())[0]] == [row.key for row in used]
            assert store.problem is None
    async with opened(path) as store:
        await store.set_overrides("a", {"priority": 3})
        await store.put_key(key("new"))
        assert (await store.load()).overrides == {"a": {"priority": 3}}
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        await SqliteStore(tmp_path / "no/state.db").open()


@pytest.mark.parametrize(
    ("field", "value", "wrong"), [("kv_weight", "heavy", "kv_weight"), ("name", "b/logs", "ends with a word of the admin API")]
)
async def test_a_model_that_this_version_does_not_understand_is_named_and_not_used(
    path: Path, caplog: pytest.LogCaptureFixture, field: str, value: str, wrong: str
) -> None:
    async with opened(path) as store:
        await store.put_model(spec("a"), 1.0)
        await store.put_model(spec("b"), 2.0)
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute(f"UPDATE models SET spec = json_set(spec, '$.{field}', ?) WHERE name = 'b'", (value,))
        assert [model.name for model in (await store.load()).models] == ["a"]
    (said,) = caplog.messages
    assert said.startswith("b: NOT USED: ")
    assert wrong in said
    assert str(path) in said


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import StoreError
from orchestrator.policy.model import ModelSpec

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    await store.put_model(ModelSpec(name="a", source="/m"), 1.0)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # every file is full now
    try:
        await store.put_model(ModelSpec(name="b", source="/m"), 2.0)
        print("written")
    except StoreError as error:
        print("refused", "disk fails or is full, see `df`" in error.message, "nothing was changed" in error.message)
    print([model.name for model in (await store.load()).models])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.put_model(ModelSpec(name="c", source="/m"), 3.0)
    await store.close()

asyncio.run(main())
"""


async def test_a_full_disk_changes_nothing(path: Path) -> None:
    said = _python(FULL_DISK, path).communicate(timeout=60)[0].splitlines()
    assert said == ["refused True True", "['a']"]
    async with opened(path) as store:
        assert [model.name for model in (await store.load()).models] == ["a", "c"]


WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from orchestrator.drivers.store import SqliteStore
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.stored import Event

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    for n in itertools.count():
        await store.put_model(ModelSpec(name=f"m{n}", source="/m"), float(n))
        await store.put_engine(f"l{n}", {"n": n})
        await store.add_events([Event(float(n), "m", "ready", "x" * 200)])
        print(n, flush=True)

asyncio.run(main())
"""


async def test_a_kill_in_the_middle_of_many_writes_loses_nothing_that_was_acknowledged(path: Path) -> None:
    writer = _python(WRITER, path)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(200)]
    writer.kill()
    acknowledged += [int(line) for line in writer.communicate()[0].splitlines()]
    async with opened(path) as store:
        stored = await store.load()
        engines, events = await store.engines(), await store.events(None, 10**6)
    for n in acknowledged:
        assert engines[f"l{n}"] == {"n": n}
    assert len(acknowledged) <= len(stored.models) <= len(acknowledged) + 2
    assert [event.at for event in events][: len(acknowledged)] == [float(n) for n in acknowledged]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_many_writers_on_one_loop(path: Path) -> None:
    async with opened(path) as store:
        await asyncio.gather(*(store.put_model(spec(f"m{n}"), float(n)) for n in range(50)))
        assert [model.name for model in (await store.load()).models] == [f"m{n}" for n in range(50)]


# ---- keys ---------------------------------------------------------------------------------------------------------------------


def key(name: str, **fields: object) -> StoredKey:
    return StoredKey(KeySpec.model_validate({"name": name, **fields}), name.encode() * 32, f"sk-{name}", 5.0)


async def test_keys_and_their_usage_survive_a_reopen(path: Path) -> None:
    full = key("b", models=["m", "org/n"], priority=-3, weight=2.5, rpm=1, tpm=2, concurrency=3, monthly_tokens=10**12, expires=9e9)
    async with opened(path) as store:
        assert await store.keys() == ([], False)
        await store.put_key(full)
        await store.put_key(key("a"))
        await store.revoke_key("a", 7.0)
        await store.add_usage([(Used("b", "m", 1, 20, 300), "2027-01-31"), (Used("b", "n", 1, 1, 1), "2027-02-01")], {"b": 8.0})
        await store.add_usage([(Used("b", "m", 2, 30, 400), "2027-01-31"), (Used("gone", "m", 1, 0, 0), "2027-02-01")], {"gone": 9.0})
    async with opened(path) as store:
        assert await store.keys() == ([replace(key("a"), revoked_at=7.0), replace(full, last_used_at=8.0)], True)
        assert await store.usage() == [Used("b", "m", 3, 50, 700), Used("b", "n", 1, 1, 1), Used("gone", "m", 1, 0, 0)]
        assert await store.usage("b", "2027-02-01") == [Used("b", "n", 1, 1, 1)]
        assert await store.usage("a") == []
        await store.put_key(key("a", rpm=5))  # in the place of the one that was revoked
        assert (await store.keys())[0][0] == key("a", rpm=5)


async def test_a_key_that_this_version_does_not_understand_lets_nobody_in_and_opens_no_door(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path) as store:
        await store.put_key(key("a"))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE keys SET spec = json_set(spec, '$.future', 1)")
        db.commit()
    async with opened(path) as store:
        assert await store.keys() == ([], True)
    assert "key a: NOT VALID" in caplog.text


async def test_no_byte_of_a_key_is_in_the_file(path: Path) -> None:
    keys = Keys()
    async with opened(path) as store:
        ledger = Ledger(keys, store)
        await ledger.load()
        _, secret = await ledger.create(KeySpec(name="a"))
        await store._run(lambda db: db.execute("PRAGMA wal_checkpoint(FULL)").close())
        kept = b"".join([await asyncio.to_thread(file.read_bytes) for file in path.parent.iterdir()])
    assert secret.encode()[:SHOWN] in kept
    assert secret.encode()[: SHOWN + 1] not in kept
    assert secret.encode()[SHOWN:] not in kept


def _python(script: str, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
