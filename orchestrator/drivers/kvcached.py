"""kvcached's segments: 24 bytes in /dev/shm (int64 limit, used, prealloc), written under flock on the file itself.

Only existing segments are opened: creating one would fake a pool. Only the first 8 bytes are written: the engine reads the
struct again under its own lock before it writes the rest. `kvctl limit` is the same operation and takes 3 s (it imports torch).
"""

import contextlib
import fcntl
import os
import shutil
import struct
import time
import uuid
from pathlib import Path

from orchestrator.policy.snapshot import Segment

SHM = Path("/dev/shm")
LAYOUT = struct.Struct("=qqq")
STEADY_TRIES = 20
LOCK_TRIES, LOCK_PAUSE_S = 20, 0.0005  # an engine holds the lock for microseconds
OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in its place is not waited for


def read(ipc_name: str) -> Segment | None:
    """The segment, or None where there is none of the right size."""
    try:
        with _locked(ipc_name, os.O_RDONLY, fcntl.LOCK_SH) as fd:
            return Segment(*LAYOUT.unpack(os.pread(fd, LAYOUT.size + 1, 0)))
    except (OSError, struct.error):
        return None


class Watched:
    """One engine's segment, kept open from look to look: the loop reads it eight times a second.

    No lock is taken, so that an engine that was stopped while it held it is still seen. Instead it is read until two reads agree: the
    kernel copies byte by byte, and one read in a million held halves of two writes.
    """

    def __init__(self, ipc_name: str) -> None:
        self._path, self._fd, self._inode = f"{SHM}/{ipc_name}", -1, 0
        self._bytes, self._segment = bytes(LAYOUT.size), Segment(0, 0, 0)

    def read(self) -> Segment | None:
        """The segment, or None where there is none of the right size. One that was removed or made anew is another file."""
        try:
            if os.lstat(self._path).st_ino != self._inode:  # no other file has the number of one that is open
                self._open()
            return self.again()
        except OSError:
            return None

    def again(self) -> Segment | None:
        """The file of the last read(), whatever became of its path: half the cost."""
        try:
            found = self._steady()
            if found != self._bytes:
                self._bytes, self._segment = found, Segment(*LAYOUT.unpack(found))
            return self._segment
        except (OSError, struct.error):
            return None

    def _steady(self) -> bytes:
        before = os.pread(self._fd, LAYOUT.size + 1, 0)
        for _ in range(STEADY_TRIES):
            if (found := os.pread(self._fd, LAYOUT.size + 1, 0)) == before:
                return found
            before = found
        raise OSError(f"{self._path} changes faster than it can be read")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._inode = -1, 0

    def _open(self) -> None:
        self.close()
        self._fd = _opened(self._path, os.O_RDONLY)
        self._inode = os.fstat(self._fd).st_ino


def _opened(path: "str | Path", flags: int, mode: int = 0) -> int:
    """Everybody may make files in /dev/shm: one of another user is none of ours, whatever it is called."""
    fd = os.open(path, flags | OPEN, mode)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(f"{path} is another user's")
    return fd


def write_limit(ipc_name: str, limit_bytes: int) -> None:
    """Write, then read back. Raises OSError: no such segment, another size, locked, or another value came back."""
    with _locked(ipc_name, os.O_RDWR, fcntl.LOCK_EX) as fd:
        size = os.fstat(fd).st_size
        if size != LAYOUT.size:
            raise OSError(f"{SHM / ipc_name} has {size} bytes, not {LAYOUT.size}: it is no kvcached segment")
        os.pwrite(fd, struct.pack("=q", limit_bytes), 0)
        found = struct.unpack("=q", os.pread(fd, 8, 0))[0]
    if found != limit_bytes:
        raise OSError(f"{SHM / ipc_name}: wrote the limit {limit_bytes}, read back {found}")


def restore(ipc_name: str, segment: Segment) -> None:
    """Make a living engine's segment anew, or give it its size and content back. Only for an engine that is known to live: a
    segment without one is a phantom. Raises OSError."""
    fd = _opened(SHM / ipc_name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, LAYOUT.size)
        os.pwrite(fd, LAYOUT.pack(segment.limit_bytes, segment.used_bytes, segment.prealloc_bytes), 0)
    finally:
        os.close(fd)


def remove(ipc_name: str) -> list[str]:
    """Remove what a killed engine left under this name, which no other launch ever has. Returns the paths removed."""
    digest = str(uuid.uuid5(uuid.NAMESPACE_DNS, ipc_name))[:8]
    removed = []
    for path in (SHM / ipc_name, Path(f"/tmp/kvcached-tp-{ipc_name}-{digest}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            removed.append(str(path))
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                removed.append(str(path))
    return removed


class _locked:
    """Open without creating, and lock without waiting for ever."""

    def __init__(self, ipc_name: str, flags: int, lock: int) -> None:
        self._path, self._flags, self._lock = SHM / ipc_name, flags, lock

    def __enter__(self) -> int:
        self._fd = _opened(self._path, self._flags)
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(self._fd, self._lock | fcntl.LOCK_NB)
                return self._fd
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S)
        os.close(self._fd)
        raise OSError(f"{self._path} stayed locked for {LOCK_TRIES * LOCK_PAUSE_S * 1000:.0f} ms")

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # closing releases the lock
