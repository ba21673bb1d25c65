"""The state file is locked, read-only, on a full disk, damaged, gone: what is said, that nothing is half done, and that it heals."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.drivers import store as driver
from orchestrator.drivers import store_file
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import StoreError
from orchestrator.policy.key import KeySpec, StoredKey, Used
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.stored import Event, Stored
from tests.support.stored import opened

pytestmark = pytest.mark.asyncio

ROOT = Path(__file__).resolve().parents[2]


def spec(name: str) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "source": "/models/a"})


def key(name: str) -> StoredKey:
    return StoredKey(KeySpec(name=name), name.encode() * 32, f"sk-{name}", 5.0)


def event(number: float) -> Event:
    return Event(number, "a", "ready", f"reason {number}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def content(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, data: bytes, at: int | None = None) -> None:
    """All of it, or a part."""
    with path.open("wb" if at is None else "r+b") as file:
        file.seek(at or 0)
        file.write(data)


def size(path: Path) -> int:
    return path.stat().st_size


def move(path: Path, to: Path) -> None:
    path.rename(to)


def mode(path: Path, bits: int) -> None:
    path.chmod(bits)


async def filled(path: Path) -> None:
    async with opened(path) as store:
        for name in ("a", "b"):
            await store.put_model(spec(name), 1.0)
        await store.put_key(key("k"))
        await store.add_events([event(float(n)) for n in range(300)])


def aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob("state.db.corrupt-*"))


# ---- while it is open -----------------------------------------------------------------------------------------------


async def test_a_file_that_may_not_be_written_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(path) as store:
        await store.put_model(spec("a"), 1.0)
        before = await store.load()
        await store._run(lambda db: db.execute("PRAGMA query_only = ON").close())  # root may write to every file
        for write in (
            store.put_model(spec("b"), 2.0),
            store.remove_model("a"),
            store.set_held("a", True),
            store.set_overrides("a", {"priority": 1}),
            store.put_engine("l", {}),
            store.put_key(key("k")),
            store.revoke_key("k", 1.0),
            store.add_usage([(Used("k", "m", 1, 2, 3), "2027-01-01")], {}),
        ):
            with pytest.raises(StoreError, match="readonly database: make it and its folder writable for this user; nothing was") as error:
                await write
            assert error.value.status == 503
            assert str(path) in error.value.message
        assert await store.load() == before
        assert "readonly database" in str(store.problem)
        await store._run(lambda db: db.execute("PRAGMA query_only = OFF").close())
        await store.put_model(spec("b"), 2.0)  # and it heals by itself
        assert store.problem is None
    assert len(caplog.messages) == 1


async def test_what_was_seen_and_can_not_be_written_is_shown_kept_written_later_and_said_once(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "UNWRITTEN_EVENTS", 50)
    caplog.set_level("INFO")
    async with opened(path) as store:
        await store.add_events([event(0.0)])
        await store._run(lambda db: db.execute("PRAGMA query_only = ON").close())
        for number in range(1, 101):
            await store.add_events([event(float(number))])
            await store.put_footprint("key", {"start_s": float(number)})
        found = await store.events("a", 1000)
        assert [one.at for one in found] == [0.0, *map(float, range(51, 101))]  # the oldest go
        assert await store.events("b", 1000) == []
        assert [one.at for one in await store.events(None, 2)] == [99.0, 100.0]
        assert len(caplog.messages) == 1
        assert "events are kept in memory" in caplog.text
        await store._run(lambda db: db.execute("PRAGMA query_only = OFF").close())
        await store.set_held("a", True)  # any change that can be written takes them along
        assert caplog.messages[1:] == [f"{path} is written again"]
    async with opened(path) as store:
        assert await store.events("a", 1000) == found
        assert (await store.load()).footprints == {"key": {"start_s": 100.0}}


async def test_an_event_with_a_letter_that_utf_8_has_not_holds_up_nothing(path: Path) -> None:
    async with opened(path) as store:
        await store.add_events([Event(1.0, "a", "failed", "log: \udc80")])
        await store.put_model(spec("a"), 1.0)
        assert await store.events("a", 9) == [Event(1.0, "a", "failed", "log: ?")]


async def test_a_lock_of_somebody_else_is_waited_for_once_and_then_told_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "WAIT_S", 0.5)
    async with opened(path) as store:
        with locked(path):
            began = time.monotonic()
            with pytest.raises(StoreError, match=r"database is locked: another program holds it: `fuser .*state.db` names it; nothing was"):
                await store.put_model(spec("a"), 1.0)
            assert time.monotonic() - began >= 0.5
            began = time.monotonic()
            for _ in range(2):
                with pytest.raises(StoreError, match="is locked"):
                    await store.put_model(spec("a"), 1.0)
            assert time.monotonic() - began < 0.5
            assert await store.load() == Stored()  # reading goes on
        await store.put_model(spec("a"), 1.0)
        assert store.problem is None
        assert await store._run(lambda db: db.execute("PRAGMA busy_timeout").fetchone()) == (5000,)


async def test_a_lock_that_is_given_back_in_time_fails_nobody(path: Path) -> None:
    async with opened(path) as store:
        ready, free = threading.Event(), threading.Event()

        def holds() -> None:
            with locked(path):
                ready.set()
                free.wait()

        holding = asyncio.create_task(asyncio.to_thread(holds))
        await asyncio.to_thread(ready.wait)
        adding = asyncio.create_task(store.put_model(spec("a"), 1.0))
        await asyncio.sleep(0)
        free.set()
        await asyncio.gather(adding, holding)
        assert [model.name for model in (await store.load()).models] == ["a"]


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_file_that_is_taken_away_takes_no_more_changes(path: Path, how: str) -> None:
    async with opened(path) as store:
        await store.put_model(spec("a"), 1.0)
        move(path, path.with_name("elsewhere"))
        if how == "replaced":
            put(path, b"")
        with pytest.raises(StoreError, match="was removed or replaced: put it back, or restart the daemon; nothing was changed"):
            await store.put_model(spec("b"), 2.0)
        move(path.with_name("elsewhere"), path)
        await store.put_model(spec("c"), 3.0)
        assert [model.name for model in (await store.load()).models] == ["a", "c"]


async def test_one_that_is_damaged_while_it_is_open_says_so_and_the_next_start_heals(path: Path) -> None:
    async with opened(path) as store:
        await store.add_events([event(float(n)) for n in range(2000)])
        await store._run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").close())
        spoil(path)
        await store._run(lambda db: db.execute("PRAGMA cache_size = 0").close())
        with pytest.raises(StoreError, match="the next start moves it aside and goes by the config files"):
            await store.events("a", 10_000)
    async with opened(path) as store:
        assert "was damaged" in str(store.problem)
        await store.put_model(spec("a"), 1.0)


# ---- at the start ---------------------------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    """All pages but the first two are noise."""
    put(path, b"\xa5" * (size(path) - 8192), at=8192)


@pytest.mark.parametrize("how", ["no database", "spoiled pages", "half of it", "a spoiled header"])
async def test_a_damaged_file_is_kept_aside_said_loudly_and_begun_anew(path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    await filled(path)
    if how == "no database":
        put(path, b"this is no SQLite file, and somebody may want it" * 100)
    elif how == "spoiled pages":
        spoil(path)
    elif how == "half of it":
        os.truncate(path, size(path) // 8192 * 4096)
    else:
        put(path, b"\0" * 100, at=0)
    was = content(path)
    put(path.with_name("state.db-wal"), b"its log")
    async with opened(path) as store:
        assert await store.load() == Stored()
        assert "was damaged" in str(store.problem)
        assert "config files alone" in str(store.problem)
        (told,) = await store.events(None, 10)
        assert (told.kind, told.reason) == ("state-lost", store.problem)
        await store.put_model(spec("c"), 1.0)
        kept, *log = aside(path)
        assert kept.read_bytes() == was
        assert [file.name for file in log if file.name.endswith("-wal")] == [f"{kept.name}-wal"]
        assert kept.name in str(store.problem)
    assert "STATE LOST" in caplog.text
    async with opened(path) as store:  # and the next start is one like any other
        assert [model.name for model in (await store.load()).models] == ["c"]
        assert store.problem is None
        assert (await store.keys()) == ([], True)


async def test_two_damaged_files_within_a_second_are_both_kept(path: Path) -> None:
    for number in range(3):
        put(path, f"no database {number}".encode() * 100)
        async with opened(path):
            pass
    assert sorted(file.read_bytes()[:13] for file in aside(path)) == [b"no database 0", b"no database 1", b"no database 2"]


@pytest.mark.parametrize(("had_keys", "spoiled", "refused"), [(False, "events", False), (True, "events", True), (False, "all", True)])
async def test_lost_keys_open_no_door(path: Path, had_keys: bool, spoiled: str, refused: bool) -> None:
    """Who has no key is let in only where it is sure that there was none; and, of course, once that file is gone."""
    async with opened(path) as store:
        if had_keys:
            await store.put_key(key("k"))
        await store.add_events([event(float(n)) for n in range(3000)])
    if spoiled == "all":
        put(path, b"\xa5" * size(path))
    else:
        put(path, b"\xa5" * 8192, at=size(path) // 8192 * 6144)
    for _ in range(2):
        async with opened(path) as store:
            assert await store.keys() == ([], refused)
    for file in aside(path):
        file.unlink()
    async with opened(path) as store:
        assert await store.keys() == ([], False)


async def test_a_file_that_is_locked_at_the_start_is_named_with_the_mend(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_file, "WAIT_S", 0.05)
    await filled(path)
    before = content(path)
    store = SqliteStore(path)
    with locked(path), pytest.raises(StoreError, match=r"state.db: database is locked: another program holds it: `fuser"):
        await store.open()
    await store.close()
    assert content(path) == before
    assert not aside(path)
    async with opened(path) as store:
        assert len((await store.load()).models) == 2


AS_NOBODY = """
import asyncio, os, sys
from pathlib import Path
from orchestrator.drivers.store import SqliteStore
from orchestrator.errors import StoreError

async def main():
    try:
        await SqliteStore(Path(sys.argv[1])).open()
        print("opened")
    except StoreError as error:
        print(error.message)

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("file", "folder", "said"),
    [
        (0o444, 0o777, "attempt to write a readonly database: make it and its folder writable for this user"),
        (0o666, 0o555, "make its folder, and both writable for this user|make it and its folder writable for this user"),
        (0o000, 0o777, "unable to open database file: make its folder, and both writable for this user"),
    ],
)
async def test_a_file_or_folder_that_is_read_only_is_named_with_the_mend(path: Path, file: int, folder: int, said: str) -> None:
    await filled(path)
    for above in path.parents:
        if not above.stat().st_mode & 0o001:
            mode(above, 0o755)  # pytest's own are closed to others
    before = content(path)
    mode(path, file)
    mode(path.parent, folder)
    try:
        command = [sys.executable, "-c", AS_NOBODY, str(path)]
        done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    finally:
        mode(path.parent, 0o755)
        mode(path, 0o644)
    assert done.stdout.startswith(f"{path}: ")
    assert any(words in done.stdout for words in said.split("|")), done.stdout
    assert content(path) == before
    assert not aside(path)
    async with opened(path) as store:
        assert len((await store.load()).models) == 2
