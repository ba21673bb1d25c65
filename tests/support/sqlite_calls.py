"""SQLite's own calls that write, of this process, through the switch its authors test faults with: sqlite3_vfs.xSetSystemCall.

The n-th of them from `arm` on kills the process (`kill`; `torn`: a write has half happened by then), or fails as on a full disk (`full`:
and all that follow).
"""

import _sqlite3
import ctypes
import errno
import os
import signal
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_void_p
from typing import Any

LIBRARY = ctypes.CDLL(_sqlite3.__file__)  # and through it the libsqlite3 that Python's module uses
# name -> result, arguments
CALLS: dict[str, tuple[Any, ...]] = {
    "open": (c_int, c_char_p, c_int, c_int),
    "write": (c_ssize_t, c_int, c_void_p, c_size_t),
    "pwrite": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "pwrite64": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "ftruncate": (c_int, c_int, c_int64),
    "fallocate": (c_int, c_int, c_int64, c_int64),
    "unlink": (c_int, c_char_p),
}


class Vfs(Structure):
    """sqlite3.h: sqlite3_vfs, version 3."""

    _fields_ = (
        ("version", c_int), ("os_file", c_int), ("max_path", c_int), ("next", c_void_p), ("name", c_char_p), ("app_data", c_void_p),
        *((f"x{number}", c_void_p) for number in range(13)),
        ("set", CFUNCTYPE(c_int, c_void_p, c_char_p, c_void_p)), ("get", CFUNCTYPE(c_void_p, c_void_p, c_char_p)), ("next_call", c_void_p),
    )  # fmt: skip


class Calls:
    def __init__(self) -> None:
        self.mode, self.left, self.made = "", 0, 0
        self._kept: list[object] = []  # what C points to must live
        LIBRARY.sqlite3_vfs_find.restype = POINTER(Vfs)
        assert LIBRARY.sqlite3_initialize() == 0
        vfs = LIBRARY.sqlite3_vfs_find(None)
        for name, (result, *words) in CALLS.items():
            address = vfs.contents.get(vfs, name.encode())
            if not address:
                continue
            kind = CFUNCTYPE(result, *words, use_errno=True)
            ours = kind(self._instead(name, kind(address)))
            self._kept.append(ours)
            assert vfs.contents.set(vfs, name.encode(), ctypes.cast(ours, c_void_p)) == 0

    def arm(self, mode: str, number: int) -> None:
        self.mode, self.left, self.made = mode, number, 0

    def disarm(self) -> None:
        self.mode = ""

    def _instead(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(*words: Any) -> int:
            if not self.mode or (name == "open" and not words[1] & os.O_CREAT):
                return real(*words)
            self.made += 1
            self.left -= 1
            if self.left > 0:
                return real(*words)
            if self.mode == "full" and name not in ("open", "unlink"):  # a name still fits where no page does
                if name == "fallocate":  # it answers the error itself
                    return errno.ENOSPC
                ctypes.set_errno(errno.ENOSPC)
                return -1
            if self.mode == "torn" and "write" in name:
                real(words[0], words[1], words[2] // 2, *words[3:])
            if self.mode in ("kill", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words)

        return call
