"""The state's file: opened, checked, migrated; moved aside when it is damaged; and what each of SQLite's errors means to an operator.

WAL with synchronous=FULL: a change that was committed is on the disk (0.14 ms where it was measured). A file that can not be read any
more never holds up the daemon: it is kept beside the new one, for people, and what was in it is gone for us.
"""

import contextlib
import logging
import sqlite3
import time
from pathlib import Path

from orchestrator.errors import StoreError

log = logging.getLogger(__name__)

WAIT_S = 5.0  # for a lock of somebody else, a backup's for example
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
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
MENDS = {
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_BUSY: "another program holds it: `fuser {path}` names it",
    sqlite3.SQLITE_LOCKED: "another program holds it: `fuser {path}` names it",
    sqlite3.SQLITE_READONLY: "make it and its folder writable for this user",
    sqlite3.SQLITE_PERM: "make it and its folder writable for this user",
    sqlite3.SQLITE_CANTOPEN: "make its folder, and both writable for this user",
    sqlite3.SQLITE_IOERR: "its disk fails or is full, see `df` and `dmesg`",
    sqlite3.SQLITE_CORRUPT: "it is damaged; the next start moves it aside and goes by the config files",
    sqlite3.SQLITE_NOTADB: "it is damaged; the next start moves it aside and goes by the config files",
}


class Damaged(Exception):
    """It holds what SQLite can not have written. `db` is open: to close it first would remove its log."""

    def __init__(self, why: str, db: sqlite3.Connection) -> None:
        super().__init__(why)
        self.db = db


def code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for what Python's module itself raises."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def said(path: Path, error: sqlite3.Error) -> str:
    """What is wrong, and the mend."""
    mend = MENDS.get(code(error), "")
    return f"{path}: {error}" + (f": {mend.format(path=path)}" if mend else "")


def open_file(path: Path) -> tuple[sqlite3.Connection, str | None]:
    """And, where what was there had to be moved aside, the words to say so. Raises StoreError where it can not be used now."""
    try:
        try:
            return _open(path), None
        except Damaged as error:
            aside = _move_aside(path)
            error.db.close()
            lost = (
                f"{path} was damaged ({error}) and is {aside.name} now: started from the config files alone; what was added or changed with"
                " orchestratorctl (models, limits, keys) is to be added anew"
            )
            return _open(path), lost
    except sqlite3.Error as error:
        raise StoreError(said(path, error)) from None
    except OSError as error:
        raise StoreError(f"{path} is damaged, and can not be moved aside: {error.strerror}") from None


def lost_keys(path: Path) -> bool:
    """Whether a file that was moved aside had keys, or may have had: then whoever has none must not be let in."""
    return any(_had_keys(aside) for aside in path.parent.glob(f"{path.name}.corrupt-*Z"))


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error, Damaged, StoreError for one of a newer version."""
    db = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{path} was written by a newer version (schema {version}, this one knows {len(MIGRATIONS)}): upgrade the daemon"
            )
        if (wrong := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise Damaged(" ".join(wrong.split()), db)
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN IMMEDIATE; {migration} PRAGMA user_version = {number}; COMMIT;")
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")  # whether it may be written is known now, not with the first change
        db.execute("ROLLBACK")
    except (sqlite3.Error, StoreError) as error:
        if isinstance(error, sqlite3.Error) and code(error) in DAMAGED:
            raise Damaged(str(error), db) from None
        db.close()
        raise
    return db


def _move_aside(path: Path) -> Path:
    """The file first: a log without its file is nothing to SQLite, a file without its log would pass for whole."""
    stamp = time.time()
    while (aside := path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(stamp))}")).exists():
        stamp += 1.0
    path.rename(aside)
    for ending in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))
    return aside


def _had_keys(aside: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{aside}?mode=ro", uri=True)) as db:
            return db.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None
    except sqlite3.Error as error:
        return "no such table" not in str(error)
