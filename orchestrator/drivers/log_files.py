"""The logs that engines, launch servers and the NVML process write: none becomes larger than it may, however long its writer lives.

The writer keeps its descriptor (its session is known by it: processes.writing_to), so a log that is too large is copied to `<log>.1`, in
the place of an earlier one, and cut to nothing: its writer, which appends, goes on at the new end. What is written in the microseconds
between the last look at its end and the cut is lost. Where the disk takes no copy, the cut is made all the same: it is what gives room.
"""

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

# Of ours alone: `dirs.logs` may be a folder that others log to.
OURS = re.compile(r"(.+-[0-9a-f]{6}\.[0-9a-f]{8}|launch-server-.+|nvml)\.log")
LAUNCH = re.compile(r"(.+-[0-9a-f]{6})\.[0-9a-f]{8}\.log")
KEPT = ".1"
BLOCK = 1 << 20
READ = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # to read and to cut; a link or a pipe in its place is nobody's log
WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def cap(folder: Path, most_bytes: int) -> list[Path]:
    """Those that were larger than `most_bytes` and begin anew now; two of that size are kept of each. Blocks while it copies."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False) and entry.stat().st_size > most_bytes:
                    begin_anew(Path(entry.path))
                    found.append(Path(entry.path))
    return found


def drop(folder: Path, stems: Collection[str], before: float) -> list[Path]:
    """Those of launches of no model of these that nobody has written to since `before` (epoch): removed."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                match = LAUNCH.fullmatch(entry.name)
                if match and match[1] not in stems and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < before:
                    remove(Path(entry.path))
                    found.append(Path(entry.path))
    return found


def begin_anew(log: Path) -> None:
    """Raises OSError where there is none, or it can not be cut."""
    source = os.open(log, READ)
    try:
        with contextlib.suppress(OSError):
            _copy(source, kept(log))
        os.ftruncate(source, 0)
    finally:
        os.close(source)


def kept(log: Path) -> Path:
    """Where the part before is, if there is one."""
    return log.with_name(log.name + KEPT)


def remove(log: Path) -> None:
    for path in (log, kept(log)):
        path.unlink(missing_ok=True)


def _copy(source: int, target: Path) -> None:
    """Raises OSError, with nothing kept: half a log says less than it seems to."""
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    try:
        into = os.open(target, WRITE, 0o600)
        try:
            at, most = 0, 2 * os.fstat(source).st_size  # to its end, which moves meanwhile
            while at < most and (sent := os.sendfile(into, source, at, BLOCK)):
                at += sent
        finally:
            os.close(into)
    except OSError:
        target.unlink(missing_ok=True)
        raise
