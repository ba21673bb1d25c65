"""A state file, opened and closed again whatever happens between."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from orchestrator.drivers.store import SqliteStore


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.close()
