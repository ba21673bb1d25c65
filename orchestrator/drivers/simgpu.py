"""Simulated GPUs: a folder that simulated engines write into. Used memory is the sum of what living processes hold.

    gpus.json                          [{"uuid", "name", "total_bytes", "base_bytes"}]
    held/<uuid>/<pid>.<starttime>      8 bytes, native int64: what that process holds now

A holder counts while its pid exists with that start time (field 22 of /proc/<pid>/stat) and is no zombie.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import MIB

BASE_BYTES = 615 * MIB  # what an H200 with nothing on it shows


class SimGpus:
    def __init__(self, folder: Path, count: int, memory_bytes: int) -> None:
        self.folder = folder
        cards = [
            {
                "uuid": f"GPU-sim-{n}",
                "name": "Simulated GPU",
                "total_bytes": memory_bytes,
                "base_bytes": min(BASE_BYTES, memory_bytes // 50),
            }
            for n in range(count)
        ]
        for card in cards:
            (folder / "held" / str(card["uuid"])).mkdir(parents=True, exist_ok=True)
        (folder / "gpus.json").write_text(json.dumps(cards))

    def read(self) -> Sequence[GpuReading]:
        cards = json.loads((self.folder / "gpus.json").read_text())
        return [self._one(index, card) for index, card in enumerate(cards)]

    def _one(self, index: int, card: dict[str, str | int]) -> GpuReading:
        processes: dict[int, int] = {}
        for path in (self.folder / "held" / str(card["uuid"])).iterdir():
            pid, _, started = path.name.partition(".")
            if _running(pid, started):
                try:
                    processes[int(pid)] = struct.unpack("=q", path.read_bytes())[0]
                except (OSError, struct.error):
                    continue  # ended, or just being made
            else:
                path.unlink(missing_ok=True)
        total = int(card["total_bytes"])
        free = total - int(card["base_bytes"]) - sum(processes.values())
        return GpuReading(str(card["uuid"]), index, str(card["name"]), total, max(0, free), processes)


def _running(pid: str, started: str) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return False
    return fields[0] not in "ZX" and fields[19] == started  # fields[0] is field 3 (state), fields[19] is field 22 (starttime)
