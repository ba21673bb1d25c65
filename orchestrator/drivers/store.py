"""One SQLite file: models added by API, what operators held, footprints, engine records, events, keys and their usage. One thread.

A call that returned is on the disk; one that raised StoreError has changed nothing. Events and footprints are never worth a failure:
those that can not be written now are kept, and written with the next change that can. Desired state (models, held) and observed state
(engines, footprints, events) are separate tables; store_file.py has the schema.
"""

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from orchestrator.drivers.store_file import LOCKED, WAIT_S, code, lost_keys, open_file, said
from orchestrator.errors import StoreError
from orchestrator.policy.key import KeySpec, StoredKey, Used
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.stored import Event, Stored

log = logging.getLogger(__name__)

KEPT_EVENTS = 20_000
KEPT_USAGE = timedelta(days=400)  # thirteen months
UNWRITTEN_EVENTS = 1_000  # kept for later while the file can not be written; the oldest go
IMPATIENT_MS = 100  # for a lock that outlasted one wait of WAIT_S, until a change succeeds: callers are told at once
T = TypeVar("T")


class SqliteStore:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None
        self._place = (0, 0)  # device and inode
        self._events: deque[Event] = deque(maxlen=UNWRITTEN_EVENTS)  # not written yet
        self._last_id = 0
        self._usage_day = ""  # the newest; what is too old goes with the first of each
        self.told = asyncio.Event()  # set with the next event, and then another one
        self._footprints: dict[str, dict[str, float]] = {}  # neither
        self._lost: str | None = None
        self._lost_keys = False
        self._failing: str | None = None

    @property
    def problem(self) -> str | None:
        """For operators: why nothing can be kept now, or that what was kept is lost; None when all is well."""
        return self._failing or self._lost

    async def open(self) -> None:
        """Raises StoreError where the file can not be used now; one that is damaged is moved aside, and that is said."""

        def work() -> None:
            self._db, self._lost = open_file(self._path)
            self._last_id = self._db.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]
            found = os.stat(self._path)
            self._place = (found.st_dev, found.st_ino)
            self._lost_keys = lost_keys(self._path)

        await self._in_thread(work)
        if self._lost is not None:
            log.error("STATE LOST: %s", self._lost)
            await self.add_events([Event(time.time(), "", "state-lost", self._lost)])
        if self._lost_keys:
            log.error(
                "%s: there were API keys, or may have been, in a damaged file that lies beside it, so that whoever has none is refused:"
                " make keys anew with `orchestratorctl keys create`, or remove that file if there were none",
                self._path,
            )

    async def close(self) -> None:
        def work() -> None:
            if self._db is not None:
                if self._events or self._footprints:
                    self._commit_seen((), {})
                self._db.close()

        await self._in_thread(work)
        self._thread.shutdown()

    async def load(self) -> Stored:
        def read(db: sqlite3.Connection) -> Stored:
            rows = db.execute("SELECT name, spec FROM models ORDER BY added_at, name").fetchall()
            models = tuple(spec for name, text in rows if (spec := self._understood(name, text)))
            held = frozenset(name for (name,) in db.execute("SELECT name FROM held"))
            overrides = {name: json.loads(text) for name, text in db.execute("SELECT name, fields FROM overrides")}
            footprints = {key: json.loads(text) for key, text in db.execute("SELECT key, figures FROM footprints")}
            return Stored(models, held, overrides, footprints)

        return await self._run(read)

    def _understood(self, name: str, text: str) -> ModelSpec | None:
        """None for one of another version: the others are served all the same, and it stays here for the version that wrote it."""
        try:
            return ModelSpec.model_validate_json(text)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'spec'}: {fault['msg']}" for fault in error.errors())
            mend = "add it anew as `orchestratorctl add-model` takes it"
            log.warning("%s: NOT USED: %s holds it in a way that this version does not understand: %s; %s", name, self._path, wrong, mend)
            return None

    async def put_model(self, spec: ModelSpec, added_at: float) -> None:
        """A new model. One of that name may be left here, or what was changed of one in a config file: all of it is forgotten."""

        def write(db: sqlite3.Connection) -> None:
            _remove(db, spec.name)
            _put(db, spec, added_at)

        await self._change(write)

    async def remove_model(self, name: str) -> None:
        await self._change(lambda db: _remove(db, name))

    async def change_models(self, put: Sequence[ModelSpec], removed: Sequence[str], at: float) -> None:
        """All of it or nothing. What was changed of each is forgotten; one that was there stays held if it was."""

        def write(db: sqlite3.Connection) -> None:
            for name in removed:
                _remove(db, name)
            for spec in put:
                db.execute("DELETE FROM held WHERE name = ? AND name NOT IN (SELECT name FROM models)", (spec.name,))
                db.execute("DELETE FROM overrides WHERE name = ?", (spec.name,))
                _put(db, spec, at)

        await self._change(write)

    async def set_held(self, name: str, held: bool) -> None:
        await self._write("INSERT OR IGNORE INTO held VALUES (?)" if held else "DELETE FROM held WHERE name = ?", (name,))

    async def set_overrides(self, name: str, overrides: Mapping[str, object]) -> None:
        await self._write("INSERT OR REPLACE INTO overrides VALUES (?, ?)", (name, json.dumps(dict(overrides))))

    async def put_footprint(self, key: str, figures: Mapping[str, float]) -> None:
        """Never raises StoreError."""
        await self._in_thread(lambda: self._commit_seen((), {key: dict(figures)}))

    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None:
        await self._write("INSERT OR REPLACE INTO engines VALUES (?, ?)", (launch_id, json.dumps(dict(record))))

    async def remove_engine(self, launch_id: str) -> None:
        await self._write("DELETE FROM engines WHERE launch_id = ?", (launch_id,))

    async def engines(self) -> dict[str, dict[str, object]]:
        return await self._run(lambda db: {key: json.loads(text) for key, text in db.execute("SELECT launch_id, record FROM engines")})

    async def add_events(self, events: Sequence[Event]) -> None:
        """Never raises StoreError."""
        await self._in_thread(lambda: self._commit_seen(events, {}))
        told, self.told = self.told, asyncio.Event()
        told.set()

    async def events(self, model: str | None, limit: int, kind: str | None = None, since: float = 0.0, after: int = 0) -> list[Event]:
        """The newest `limit`, oldest first, with those that are not written yet: of one model or of all, of a kind, not older than `since`
        (epoch), with an id above `after`."""
        asked = [("model = ?", model), ("kind = ?", kind), ("at >= ?", since or None), ("id > ?", after or None)]
        where = " AND ".join(sql for sql, value in asked if value is not None) or "true"
        values = (*(value for _, value in asked if value is not None), limit)
        sql = f"SELECT at, model, kind, reason, id FROM events WHERE {where} ORDER BY id DESC LIMIT ?"

        def fits(event: Event) -> bool:
            return model in (None, event.model) and kind in (None, event.kind) and event.at >= since and event.id > after

        def read(db: sqlite3.Connection) -> list[Event]:
            kept = [Event(*row) for row in reversed(db.execute(sql, values).fetchall())]
            return [*kept, *filter(fits, self._events)][-limit:]

        return await self._run(read)

    async def keys(self) -> tuple[list[StoredKey], bool]:
        """All that this version understands, also revoked ones; and whether there was ever any, or may have been in a file that is lost."""

        def read(db: sqlite3.Connection) -> tuple[list[StoredKey], bool]:
            rows = db.execute("SELECT spec, digest, shown, created_at, last_used_at, revoked_at, name FROM keys ORDER BY created_at, name")
            found = [(self._key(row[6], row[0]), row[1:6]) for row in rows]
            return [StoredKey(spec, *rest) for spec, rest in found if spec], bool(found) or self._lost_keys

        return await self._run(read)

    def _key(self, name: str, text: str) -> KeySpec | None:
        try:
            return KeySpec.model_validate_json(text)
        except ValidationError as error:
            log.warning("key %s: NOT VALID: %s holds it in a way that this version does not understand: %s", name, self._path, error)
            return None

    async def put_key(self, key: StoredKey) -> None:
        """A new one, also in the place of a revoked one."""
        values = (key.spec.name, key.spec.model_dump_json(), key.digest, key.shown, key.created_at, key.last_used_at, key.revoked_at)
        await self._write("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    async def revoke_key(self, name: str, at: float) -> None:
        await self._write("UPDATE keys SET revoked_at = ? WHERE name = ?", (at, name))

    async def add_usage(self, used: Sequence[tuple[Used, str]], last_used_at: Mapping[str, float]) -> None:
        """`used`, each with its day (2027-01-31): added to what there is. All of it, or none."""

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT INTO usage (key, model, requests, prompt_tokens, completion_tokens, day) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens",
                [(*row, day) for row, day in used],
            )
            if used and (day := max(day for _, day in used)) != self._usage_day:
                self._usage_day = day
                db.execute("DELETE FROM usage WHERE day < ?", (str(date.fromisoformat(day) - KEPT_USAGE),))
            db.executemany("UPDATE keys SET last_used_at = ? WHERE name = ?", [(at, name) for name, at in last_used_at.items()])

        await self._change(write)

    async def usage(self, key: str | None = None, since: str = "") -> list[Used]:
        """Of one key or of all, from the day `since` on."""
        sums = "sum(requests), sum(prompt_tokens), sum(completion_tokens)"
        sql = f"SELECT key, model, {sums} FROM usage WHERE day >= ? AND (? IS NULL OR key = ?) GROUP BY key, model"
        return await self._run(lambda db: [Used(*row) for row in db.execute(sql, (since, key, key))])

    # ---- the thread -----------------------------------------------------------------------------------------------

    async def _write(self, sql: str, values: Sequence[object]) -> None:
        await self._change(lambda db: db.execute(sql, tuple(values)).close())

    async def _change(self, work: Callable[[sqlite3.Connection], None]) -> None:
        await self._in_thread(lambda: self._commit(work))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._in_thread(lambda: work(self._opened()))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreError(f"{said(self._path, error)}; nothing was changed") from None

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError(f"{self._path} is not open")
        return self._db

    def _commit(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """All of it or nothing; and with it what waits."""
        db = self._opened()
        try:
            self._check_place()
            with db:
                db.execute("BEGIN IMMEDIATE")
                work(db)
                self._write_seen(db)
        except (sqlite3.Error, StoreError) as error:
            if isinstance(error, sqlite3.Error) and code(error) in LOCKED:
                db.execute(f"PRAGMA busy_timeout = {IMPATIENT_MS}")
            if self._failing is None:
                log.error("the state can not be written; changes are refused, events are kept in memory: %s", self._words(error))
            self._failing = self._words(error)
            raise
        self._events.clear()
        self._footprints.clear()
        if self._failing is not None:
            db.execute(f"PRAGMA busy_timeout = {int(WAIT_S * 1000)}")
            log.info("%s is written again", self._path)
            self._failing = None

    def _words(self, error: sqlite3.Error | StoreError) -> str:
        return error.message if isinstance(error, StoreError) else said(self._path, error)

    def _commit_seen(self, events: Sequence[Event], footprints: Mapping[str, dict[str, float]]) -> None:
        """Now, or with the next change that can be written."""
        for event in events:
            self._last_id += 1
            self._events.append(replace(event, reason=event.reason.encode(errors="replace").decode(), id=self._last_id))
        self._footprints |= footprints
        with contextlib.suppress(sqlite3.Error, StoreError):  # it was logged, once
            self._commit(lambda db: None)

    def _write_seen(self, db: sqlite3.Connection) -> None:
        for key, figures in self._footprints.items():
            db.execute("INSERT OR REPLACE INTO footprints VALUES (?, ?)", (key, json.dumps(figures)))
        if self._events:
            rows = [astuple(event) for event in self._events]
            db.executemany("INSERT INTO events (at, model, kind, reason, id) VALUES (?, ?, ?, ?, ?)", rows)
            db.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (KEPT_EVENTS,))

    def _check_place(self) -> None:
        """What is written into a file that nobody finds any more is lost. Raises StoreError."""
        try:
            found = os.stat(self._path)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._place:
            raise StoreError(f"{self._path} was removed or replaced: put it back, or restart the daemon; nothing was changed")


def _put(db: sqlite3.Connection, spec: ModelSpec, at: float) -> None:
    """One that is there keeps its place."""
    sql = "INSERT INTO models VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET spec = excluded.spec"
    db.execute(sql, (spec.name, spec.model_dump_json(), at))


def _remove(db: sqlite3.Connection, name: str) -> None:
    for table in ("models", "held", "overrides"):
        db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))
