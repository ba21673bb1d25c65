"""The real registry on the real state file, killed (or on a full disk) at every call of SQLite that writes, one after the other.

    python -m tests.support.write_points FOLDER BEFORE MODE

BEFORE is what lies there at the start: none, old (the first schema), clean, hot (its last owner was killed) or full-log (the next change
makes SQLite move its log into the file). MODE as in sqlite_calls.py. One line of JSON a write point: what was answered, what is there.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from orchestrator.control.registry import Registry
from orchestrator.drivers.store import SqliteStore
from orchestrator.drivers.store_file import MIGRATIONS
from orchestrator.errors import StoreError
from orchestrator.policy.footprint import Shape
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import GpuReading
from tests.support.sqlite_calls import Calls

GPUS = [GpuReading("GPU-0", 0, "", 80 << 30, 79 << 30)]
STEPS = ("+c", "-a", "+d", "-c", "+a")  # added, removed; a was held and had its limits changed


class Sources:
    def problem(self, spec: ModelSpec) -> str | None:
        return None

    def shape(self, spec: ModelSpec) -> Shape | None:
        return None


def spec(name: str) -> ModelSpec:
    return ModelSpec(name=name, source=f"/models/{name}", args=("--max-model-len", "4096"))


async def house(path: Path) -> tuple[SqliteStore, Registry]:
    store = SqliteStore(path)
    await store.open()
    registry = Registry(store, Sources(), (), ["default"], Rules(0, 1.0, 0))
    await registry.load()
    return store, registry


async def step(registry: Registry, what: str) -> None:
    if what[0] == "+":
        await registry.add(spec(what[1:]), GPUS, start=False)
    else:
        await registry.remove(what[1:])


async def prepare(path: Path, before: str) -> None:
    if before == "none":
        return
    if before == "old":
        db = sqlite3.connect(path)
        db.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        for name in "ab":
            db.execute("INSERT INTO models VALUES (?, ?, 1.0)", (name, spec(name).model_dump_json()))
        db.commit()
        db.close()
        return
    store, registry = await house(path)
    for name in "ab":
        await registry.add(spec(name), GPUS, start=False)
    await registry.hold("a", True)
    await registry.limit("a", {"priority": 3}, GPUS)
    if before == "full-log":
        while path.with_name("state.db-wal").stat().st_size < 4112 * 997:
            await store.put_footprint("key", {"start_s": 1.0})
    if before == "clean":
        await store.close()


async def killed(path: Path, say: Callable[[str], None]) -> None:
    store, registry = await house(path)
    say("open")
    for what in STEPS:
        if what == "-a" and "a" not in registry.known():
            continue
        await step(registry, what)
        say(what)
    await store.close()
    say("close")


async def on_a_full_disk(path: Path, say: Callable[[str], None], calls: Calls) -> None:
    """Each step that is refused is checked to have changed nothing, and made again on a disk that has room."""

    async def again(work: Callable[[], Awaitable[Any]], unchanged: Callable[[], Awaitable[Any]]) -> Any:
        before = await unchanged()
        try:
            return await work()
        except StoreError as error:
            said = error.message
        assert str(path) in said, said
        assert "`df`" in said or "free space" in said, said
        assert await unchanged() == before, "half done"
        calls.disarm()
        say("refused")
        return await work()

    async def nothing() -> None: ...

    store, registry = await again(lambda: house(path), nothing)
    say("open")

    async def kept() -> object:
        return dict(registry.known()), await store.load()

    for what in STEPS:
        if what == "-a" and "a" not in registry.known():
            continue
        await again(lambda what=what: step(registry, what), kept)  # type: ignore[misc]
        say(what)
    await store.close()
    say("close")


async def found(path: Path, say: Callable[[str], None]) -> None:
    """As the next daemon finds it."""
    store, registry = await house(path)
    stored = await store.load()
    names = sorted(registry.known())
    whole = all(model.spec.source == f"/models/{name}" for name, model in registry.known().items())
    integrity = await store._run(lambda db: db.execute("PRAGMA integrity_check").fetchone()[0])
    changed = sorted(stored.held | stored.overrides.keys())
    say(json.dumps({"models": names, "whole": whole, "integrity": integrity, "changed": changed, "problem": store.problem}))
    await store.close()


def forked(work: Callable[[Callable[[str], None]], Awaitable[None]]) -> tuple[list[str], int]:
    """What it said, and how it ended."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        code = 1
        try:
            asyncio.run(work(lambda text: os.write(theirs, f"{text}\n".encode()) and None))  # type: ignore[arg-type]
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as heard:
        lines = heard.read().splitlines()
    return lines, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, before: str, mode: str) -> None:
    calls = Calls()
    start = folder / "start"
    start.mkdir()
    forked(lambda say: prepare(start / "state.db", before))
    for number in itertools.count(1):
        here = folder / str(number)
        shutil.copytree(start, here)
        path = here / "state.db"

        def life(say: Callable[[str], None], number: int = number, path: Path = path) -> Awaitable[None]:
            calls.arm(mode, number)
            return on_a_full_disk(path, say, calls) if mode == "full" else killed(path, say)

        answered, code = forked(life)
        assert code in (0, -signal.SIGKILL), f"write point {number}: exit code {code}"
        (after,), _ = forked(lambda say, path=path: found(path, say))  # type: ignore[misc]
        print(json.dumps({"point": number, "answered": answered, "code": code, **json.loads(after)}), flush=True)
        shutil.rmtree(here)
        if code == 0 and "refused" not in answered:
            return  # there was no such call any more


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
