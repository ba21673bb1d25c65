"""An engine's log as text, from its last lines on, across launches. Files are read in a thread, in blocks: they may be large."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

LOG_POLL_S = 0.2
LOG_BLOCK = 64 * 1024
MAX_TAIL = 100_000  # lines


async def read(newest: Callable[[], Path | None], tail: int, follow: bool) -> AsyncIterator[bytes]:
    """The last `tail` lines of the newest log, then what is written more. `newest` is asked again and again: a new launch writes a new
    file, and a model that was never started has none yet."""
    current, at = newest(), 0
    if current is not None:
        lines, at = await asyncio.to_thread(tail_of, current, tail)
        yield lines
    while follow:
        latest = newest()
        if latest is not None and latest != current:
            current, at = latest, 0
        if current is not None and (found := await asyncio.to_thread(read_from, current, at))[0]:
            block, at = found
            yield block
        else:
            await asyncio.sleep(LOG_POLL_S)


def tail_of(path: Path, lines: int) -> tuple[bytes, int]:
    """The last lines, and where the file ended. Reads backwards in blocks."""
    with open(path, "rb") as file:
        end = at = file.seek(0, os.SEEK_END)
        found = b""
        while at > 0 and found.count(b"\n") <= lines:
            at = max(0, at - LOG_BLOCK)
            file.seek(at)
            found = file.read(end - at)
    kept = found.splitlines(keepends=True)
    return b"".join(kept[-lines:] if lines else []), end


def read_from(path: Path, at: int) -> tuple[bytes, int]:
    """What comes next, and where that ends. A file that is shorter than it was began anew (drivers/log_files.py)."""
    try:
        with open(path, "rb") as file:
            file.seek(at if at <= os.fstat(file.fileno()).st_size else 0)
            return file.read(LOG_BLOCK), file.tell()
    except FileNotFoundError:
        return b"", at
