"""The 24 bytes in /dev/shm by which kvcached tells its use of memory and takes its limit.

Three native int64: total (the limit asked for), used, prealloc; each access under flock on the file itself.
The engine overwrites the file when it starts; later it re-reads it under the lock before each write, so that a total
written by others stays. A file that vanished comes back with total 0, as kvcached 0.1.6 brings it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

_LAYOUT = struct.Struct("=qqq")
_SHM = Path("/dev/shm")
_SOCKET_ROOT = Path("/tmp")
_MAX_SOCKET_PATH = 108  # sun_path of a Unix socket on Linux


def segment_name(configured: str | None) -> str:
    """KVCACHED_IPC_NAME as kvcached cleans it, or the name it makes up from the process group."""
    if configured:
        return "".join(ch if ch.isalnum() or ch in "_-" else "-" for ch in configured)[:64]
    base = f"kvcached_vLLM_{os.getpgid(0)}"
    names = [base, *(f"{base}_{i}" for i in range(1, 100))]
    return next((name for name in names if not (_SHM / name).exists()), f"{base}_{os.getpid()}")


class Segment:
    """The segment of one pool; `create` first, `unlink` only ever removes the very file that was created."""

    def __init__(self, name: str) -> None:
        self.path = _SHM / name
        self.inode: int | None = None

    def create(self, capacity_bytes: int) -> None:
        with self._open(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
            os.ftruncate(descriptor, _LAYOUT.size)
            os.pwrite(descriptor, _LAYOUT.pack(capacity_bytes, 0, 0), 0)
            self.inode = os.fstat(descriptor).st_ino

    def publish(self, used_bytes: int, prealloc_bytes: int) -> None:
        with self._open(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
            os.ftruncate(descriptor, _LAYOUT.size)
            total_bytes = _LAYOUT.unpack(os.pread(descriptor, _LAYOUT.size, 0))[0]
            os.pwrite(descriptor, _LAYOUT.pack(total_bytes, used_bytes, prealloc_bytes), 0)

    def total_bytes(self) -> int | None:
        try:
            with self._open(os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
                data = os.pread(descriptor, _LAYOUT.size, 0)
        except OSError:
            return None
        return int(_LAYOUT.unpack(data)[0]) if len(data) == _LAYOUT.size else None

    def unlink(self) -> None:
        unlink_segment(self.path, self.inode)

    @contextlib.contextmanager
    def _open(self, flags: int, lock: int) -> Iterator[int]:
        descriptor = os.open(self.path, flags, 0o666)
        try:
            fcntl.flock(descriptor, lock)
            yield descriptor
        finally:
            os.close(descriptor)


def unlink_segment(path: Path, inode: int | None) -> None:
    with contextlib.suppress(OSError):
        if inode is not None and path.stat().st_ino == inode:
            path.unlink()


class WorkerSockets:
    """kvcached's sockets to its workers: made at any tensor-parallel size, and left behind at the end."""

    def __init__(self, name: str, ranks: int) -> None:
        suffix = uuid.uuid5(uuid.NAMESPACE_DNS, name).hex[:8]
        self.folder = _SOCKET_ROOT / f"kvcached-tp-{name}-{suffix}"
        self._paths = [self.folder / f"w{rank}.sock" for rank in range(ranks)]
        self._sockets: list[socket.socket] = []

    def open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in self._paths:
            if len(str(path)) > _MAX_SOCKET_PATH:
                raise RuntimeError(f"Socket path too long ({len(str(path))} chars, max {_MAX_SOCKET_PATH}): {path}")
            path.unlink(missing_ok=True)
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.bind(str(path))
            server.listen(1)
            self._sockets.append(server)
