"""Simulated GPUs: a folder that simulated engines write into. Used memory is the sum of what living processes hold.

    gpus.json                          [{"uuid", "name", "total_bytes", "base_bytes"}]
    held/<uuid>/<pid>.<starttime>      8 bytes, native int64: what that process holds now

A holder counts while its pid exists with that start time (field 22 of /proc/<pid>/stat) and has not ended. A look is cheap, because
the loop looks four times a second: /proc is asked once a holder, a pidfd says when it has ended; a folder is listed when it changed.
"""

import contextlib
import json
import os
import select
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import MIB

BASE_BYTES = 615 * MIB  # what an H200 with nothing on it shows
HELD = struct.Struct("=q")
STAMP_NS = 100_000_000  # two changes within a tick of the kernel's clock (10 ms at most) may bear the same time


class SimGpus:
    def __init__(self, folder: Path, count: int, memory_bytes: int) -> None:
        self.folder = folder
        base = min(BASE_BYTES, memory_bytes // 50)
        self._empty = [GpuReading(f"GPU-sim-{n}", n, "Simulated GPU", memory_bytes, memory_bytes - base) for n in range(count)]
        for card in self._empty:
            (folder / "held" / card.uuid).mkdir(parents=True, exist_ok=True)
        rows = [{"uuid": card.uuid, "name": card.name, "total_bytes": memory_bytes, "base_bytes": base} for card in self._empty]
        (folder / "gpus.json").write_text(json.dumps(rows))
        self._living = _Living()
        self._holders = [_Holders(f"{folder}/held/{card.uuid}", self._living) for card in self._empty]

    def read(self) -> Sequence[GpuReading]:
        os.stat(f"{self.folder}/gpus.json")  # raises where the folder is gone: then nothing can be said of any card
        self._living.look()
        return [_used(card, holders.read()) for card, holders in zip(self._empty, self._holders, strict=True)]


def _used(card: GpuReading, processes: dict[int, int]) -> GpuReading:
    free = card.free_bytes - sum(processes.values())
    return GpuReading(card.uuid, card.index, card.name, card.total_bytes, max(0, free), processes)


class _Holders:
    """The files under one held/<uuid>, kept open while nobody comes or goes."""

    def __init__(self, path: str, living: "_Living") -> None:
        self._path, self._living = path, living
        self._fds: dict[str, int] = {}
        self._listed_ns = 0  # the folder's time of change when it was listed; 0: list it again

    def read(self) -> dict[int, int]:
        """Bytes by pid."""
        changed_ns = os.stat(self._path).st_mtime_ns
        if changed_ns != self._listed_ns or not self._fds.keys() <= self._living.names:
            self._list()
            self._listed_ns = changed_ns if time.time_ns() - changed_ns > STAMP_NS else 0
        processes: dict[int, int] = {}
        for name, fd in self._fds.items():
            data = os.pread(fd, HELD.size + 1, 0)
            if len(data) == HELD.size:  # else it is just being made
                processes[int(name.partition(".")[0])] = HELD.unpack(data)[0]
        return processes

    def _list(self) -> None:
        self._close()
        for name in os.listdir(self._path):
            path = f"{self._path}/{name}"
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if self._living.has(name):
                    self._fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                else:
                    os.unlink(path)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    __del__ = _close


class _Living:
    """The holders that live. A pidfd stands for that very process, whoever gets its pid, and is readable once it has ended."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._of: dict[int, str] = {}  # pidfd -> name
        self._poll = select.poll()

    def look(self) -> None:
        for fd, _ in self._poll.poll(0):
            self._poll.unregister(fd)
            self.names.discard(self._of.pop(fd))
            os.close(fd)

    def has(self, name: str) -> bool:
        pid, _, started = name.partition(".")
        if name in self.names:
            return True
        if not _running(pid, started):
            return False
        try:
            fd = os.pidfd_open(int(pid))
        except ProcessLookupError:  # it ended just now
            return False
        self._poll.register(fd, select.POLLIN)
        self._of[fd] = name
        self.names.add(name)
        return True

    def __del__(self) -> None:
        for fd in self._of:
            os.close(fd)


def _running(pid: str, started: str) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return False
    return fields[0] not in "ZX" and fields[19] == started  # fields[0] is field 3 (state), fields[19] is field 22 (starttime)
