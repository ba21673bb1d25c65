"""A GPU made of files: who holds how many bytes of which card.

`$SIM_GPU_DIR/gpus.json` names the cards; `held/<uuid>/<pid>.<starttime>` is one native int64 for each process.
A file counts only while that very process (pid and start time) lives, so memory comes back when a process is killed.
Bytes are taken under the lock file only, so two processes never both get the last page.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_INT64 = struct.Struct("=q")


class OutOfMemory(Exception):
    """The card cannot give the bytes asked for; the text is PyTorch's."""


@dataclass(frozen=True)
class Card:
    """One simulated GPU as gpus.json describes it; `base_bytes` is what the empty card shows as used."""

    uuid: str
    name: str
    total_bytes: int
    base_bytes: int


def read_cards(root: Path) -> list[Card]:
    rows = json.loads((root / "gpus.json").read_text())
    return [Card(str(r["uuid"]), str(r["name"]), int(r["total_bytes"]), int(r["base_bytes"])) for r in rows]


def visible_cards(cards: Sequence[Card], cuda_visible_devices: str | None) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves; like CUDA, the list ends at the first name that is no card."""
    if cuda_visible_devices is None:
        return list(cards)
    chosen: list[Card] = []
    for name in (part.strip() for part in cuda_visible_devices.split(",")):
        if name.isdigit() and int(name) < len(cards):
            chosen.append(cards[int(name)])
            continue
        named = [card for card in cards if name and card.uuid.startswith(name)]
        if not named:
            break
        chosen.append(named[0])
    return chosen


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat, or None for a process that is gone or a zombie (its memory is back already)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


class SimGpu:
    """What this process holds of one card. Build it in the process that holds: the file bears its pid."""

    def __init__(self, root: Path, card: Card) -> None:
        self.card = card
        self.held = 0
        self._lock_path = root / "lock"
        self._folder = root / "held" / card.uuid
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own = self._folder / f"{os.getpid()}.{start_time(os.getpid())}"

    def take(self, count_bytes: int) -> None:
        with self._lock():
            free_bytes = self.free_bytes()
            if count_bytes > free_bytes:
                raise OutOfMemory(
                    f"CUDA out of memory. Tried to allocate {count_bytes / 2**30:.2f} GiB. GPU 0 has a total capacity "
                    f"of {self.card.total_bytes / 2**30:.2f} GiB of which {free_bytes / 2**30:.2f} GiB is free."
                )
            self._write(self.held + count_bytes)

    def give(self, count_bytes: int) -> None:
        if count_bytes > self.held:
            raise ValueError(f"give: {count_bytes} bytes are more than the {self.held} held of {self.card.uuid}")
        with self._lock():
            self._write(self.held - count_bytes)

    def free_bytes(self) -> int:
        return self.card.total_bytes - self.card.base_bytes - sum(self.holders().values())

    def holders(self) -> dict[int, int]:
        """Bytes of each living process, by pid."""
        holders: dict[int, int] = {}
        for entry in os.scandir(self._folder):
            pid, _, started = entry.name.partition(".")
            if not (pid.isdigit() and started.isdigit()) or start_time(int(pid)) != int(started):
                continue
            with contextlib.suppress(OSError):
                data = Path(entry.path).read_bytes()
                holders[int(pid)] = _INT64.unpack(data)[0] if len(data) == _INT64.size else 0
        return holders

    def close(self) -> None:
        self.held = 0
        self._own.unlink(missing_ok=True)

    def _write(self, held_bytes: int) -> None:
        descriptor = os.open(self._own, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, _INT64.pack(held_bytes), 0)
        finally:
            os.close(descriptor)
        self.held = held_bytes

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class GpuGroup:
    """The cards of one engine: tensor parallelism takes the same bytes on each, or none on any."""

    def __init__(self, gpus: Sequence[SimGpu]) -> None:
        self.gpus = list(gpus)
        self.total_bytes = min(gpu.card.total_bytes for gpu in gpus)

    def take(self, count_bytes: int) -> None:
        taken: list[SimGpu] = []
        for gpu in self.gpus:
            try:
                gpu.take(count_bytes)
            except OutOfMemory:
                for other in taken:
                    other.give(count_bytes)
                raise
            taken.append(gpu)

    def give(self, count_bytes: int) -> None:
        for gpu in self.gpus:
            gpu.give(count_bytes)

    def free_bytes(self) -> int:
        return min(gpu.free_bytes() for gpu in self.gpus)

    def close(self) -> None:
        for gpu in self.gpus:
            gpu.close()
