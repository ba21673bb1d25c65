"""One SQLite file: models added by API, what operators held, footprints, engine records, events, keys and their usage. One thread.

WAL with synchronous=FULL: a call that returned is on the disk (0.14 ms where it was measured). Desired state (models, held) and
observed state (engines, footprints, events) are separate tables.
"""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from orchestrator.errors import StoreError
from orchestrator.policy.key import KeySpec, StoredKey, Used
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.stored import Event, Stored

log = logging.getLogger(__name__)

KEPT_EVENTS = 20_000
MIGRATIONS = (  # user_version N: the first N were run; a new one is added at the end and none is ever changed
    """
CREATE TABLE models (name TEXT PRIMARY KEY, spec TEXT NOT NULL, added_at REAL NOT NULL) STRICT;
CREATE TABLE held (name TEXT PRIMARY KEY) STRICT;
CREATE TABLE footprints (key TEXT PRIMARY KEY, figures TEXT NOT NULL) STRICT;
CREATE TABLE engines (launch_id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL NOT NULL, model TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL) STRICT;
CREATE INDEX events_by_model ON events (model, id);
""",
    "CREATE TABLE overrides (name TEXT PRIMARY KEY, fields TEXT NOT NULL) STRICT;",
    """
CREATE TABLE keys (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, digest BLOB NOT NULL, shown TEXT NOT NULL,
    created_at REAL NOT NULL, last_used_at REAL, revoked_at REAL
) STRICT;
CREATE TABLE usage (
    key TEXT NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (key, model, day)
) STRICT, WITHOUT ROWID;
""",
)
T = TypeVar("T")


class SqliteStore:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        await self._run(self._open)

    async def close(self) -> None:
        await self._run(lambda db: db.close())
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
            with db:
                db.execute("DELETE FROM held WHERE name = ?", (spec.name,))
                db.execute("DELETE FROM overrides WHERE name = ?", (spec.name,))
                db.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", (spec.name, spec.model_dump_json(), added_at))

        await self._run(write)

    async def remove_model(self, name: str) -> None:
        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute("DELETE FROM models WHERE name = ?", (name,))
                db.execute("DELETE FROM held WHERE name = ?", (name,))
                db.execute("DELETE FROM overrides WHERE name = ?", (name,))

        await self._run(write)

    async def set_held(self, name: str, held: bool) -> None:
        await self._write("INSERT OR IGNORE INTO held VALUES (?)" if held else "DELETE FROM held WHERE name = ?", (name,))

    async def set_overrides(self, name: str, overrides: Mapping[str, object]) -> None:
        await self._write("INSERT OR REPLACE INTO overrides VALUES (?, ?)", (name, json.dumps(dict(overrides))))

    async def put_footprint(self, key: str, figures: Mapping[str, float]) -> None:
        await self._write("INSERT OR REPLACE INTO footprints VALUES (?, ?)", (key, json.dumps(dict(figures))))

    async def put_engine(self, launch_id: str, record: Mapping[str, object]) -> None:
        await self._write("INSERT OR REPLACE INTO engines VALUES (?, ?)", (launch_id, json.dumps(dict(record))))

    async def remove_engine(self, launch_id: str) -> None:
        await self._write("DELETE FROM engines WHERE launch_id = ?", (launch_id,))

    async def engines(self) -> dict[str, dict[str, object]]:
        return await self._run(lambda db: {key: json.loads(text) for key, text in db.execute("SELECT launch_id, record FROM engines")})

    async def add_events(self, events: Sequence[Event]) -> None:
        def write(db: sqlite3.Connection) -> None:
            with db:
                db.executemany("INSERT INTO events (at, model, kind, reason) VALUES (?, ?, ?, ?)", [astuple(event) for event in events])
                db.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (KEPT_EVENTS,))

        await self._run(write)

    async def events(self, model: str | None, limit: int) -> list[Event]:
        """The newest `limit`, oldest first."""
        where, values = ("WHERE model = ?", (model, limit)) if model is not None else ("", (limit,))
        sql = f"SELECT at, model, kind, reason FROM events {where} ORDER BY id DESC LIMIT ?"
        return await self._run(lambda db: [Event(*row) for row in reversed(db.execute(sql, values).fetchall())])

    async def keys(self) -> tuple[list[StoredKey], bool]:
        """All that this version understands, also revoked ones; and whether there was ever any."""

        def read(db: sqlite3.Connection) -> tuple[list[StoredKey], bool]:
            rows = db.execute("SELECT spec, digest, shown, created_at, last_used_at, revoked_at, name FROM keys ORDER BY created_at, name")
            found = [(self._key(row[6], row[0]), row[1:6]) for row in rows]
            return [StoredKey(spec, *rest) for spec, rest in found if spec], bool(found)

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
            with db:
                db.executemany(
                    "INSERT INTO usage (key, model, requests, prompt_tokens, completion_tokens, day) VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,"
                    " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                    " completion_tokens = completion_tokens + excluded.completion_tokens",
                    [(*row, day) for row, day in used],
                )
                db.executemany("UPDATE keys SET last_used_at = ? WHERE name = ?", [(at, name) for name, at in last_used_at.items()])

        await self._run(write)

    async def usage(self, key: str | None = None, since: str = "") -> list[Used]:
        """Of one key or of all, from the day `since` on."""
        sums = "sum(requests), sum(prompt_tokens), sum(completion_tokens)"
        sql = f"SELECT key, model, {sums} FROM usage WHERE day >= ? AND (? IS NULL OR key = ?) GROUP BY key, model"
        return await self._run(lambda db: [Used(*row) for row in db.execute(sql, (since, key, key))])

    def _open(self, _: object) -> None:
        db = sqlite3.connect(self._path, timeout=5.0, check_same_thread=False)
        self._db = db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self._path} was written by a newer version (schema {version}, this one knows {len(MIGRATIONS)}): upgrade the daemon"
            )
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")

    async def _write(self, sql: str, values: Sequence[object]) -> None:
        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute(sql, tuple(values))

        await self._run(write)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(self._db))  # type: ignore[arg-type]
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {error}; nothing was changed") from None
