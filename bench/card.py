"""What a GPU and the pools on it look like, many times a second and past the daemon: NVML's free bytes and the 24-byte segments.

The daemon's word is what is measured, so it is not what is asked. NVML is read between two looks at the segments, and of the two
the smaller use counts: the two can not be read at the same moment, and pool memory must not be taken for larger than it is.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.drivers import kvcached
from orchestrator.engine.simulator.gpu import SimGpu, read_cards
from orchestrator.policy.snapshot import Segment

PERIOD_S = 0.01


@dataclass(frozen=True)
class Row:
    """One look. `at`: time.monotonic() when it was complete. Bytes; limits and uses by model, None where the segment is gone."""

    at: float
    free: int
    limits: Mapping[str, int | None]
    mapped: Mapping[str, int | None]
    reserve: int

    @property
    def limit(self) -> int:
        return sum(size or 0 for size in self.limits.values())

    @property
    def pool(self) -> int:
        """P: what all pools together may hold."""
        return self.free + sum(size or 0 for size in self.mapped.values()) - self.reserve

    @property
    def fits(self) -> bool:
        return self.limit <= self.pool


def free_reader(gpu: Mapping[str, Any], simulated: Path | None) -> Callable[[], int]:
    """Reads the free bytes of the GPU that /status calls `gpu`. `simulated`: the folder of the simulated cards."""
    if simulated is not None:
        (card,) = [card for card in read_cards(simulated) if card.uuid == gpu["uuid"]]
        return SimGpu(simulated, card).free_bytes
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(gpu["uuid"])
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)


class Watch:
    """Looks from a thread of its own for as long as the `with` lasts. Keep the process idle besides: Python runs one thread at a time."""

    def __init__(self, free: Callable[[], int], ipc_names: Mapping[str, str], reserve_bytes: int) -> None:
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self._free, self._ipc_names, self._reserve = free, ipc_names, reserve_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> Row:
        before = self._segments()
        free = self._free()
        after = self._segments()
        mapped: dict[str, int | None] = {}
        for name, segment in after.items():
            old = before[name]
            mapped[name] = None if segment is None else min(segment.mapped_bytes, (old or segment).mapped_bytes)
        limits = {name: segment.limit_bytes if segment else None for name, segment in after.items()}
        return Row(time.monotonic(), free, limits, mapped, self._reserve)

    def hz(self) -> float:
        return (len(self.rows) - 1) / (self.rows[-1].at - self.rows[0].at) if len(self.rows) > 1 else 0.0

    def widest_gap_s(self) -> float:
        return max((b.at - a.at for a, b in zip(self.rows, self.rows[1:], strict=False)), default=0.0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _segments(self) -> dict[str, Segment | None]:
        return {name: kvcached.read(ipc) for name, ipc in self._ipc_names.items()}

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            try:
                self.rows.append(self.look())
            except Exception as error:  # one look that failed is a gap in the picture, not the end of the run
                self.failed.append(f"{type(error).__name__}: {error}")


def write_rows(rows: Sequence[Row], began: float, path: Path) -> None:
    """As CSV: MiB, by model limits and uses."""
    names = list(rows[0].limits) if rows else []
    lines = [",".join(["second", "free_mib", "pool_mib", *(f"limit_{n}_mib" for n in names), *(f"mapped_{n}_mib" for n in names)])]
    for row in rows:
        sizes = [row.free, row.pool, *(row.limits[n] or 0 for n in names), *(row.mapped[n] or 0 for n in names)]
        lines.append(",".join([f"{row.at - began:.3f}", *(str(size >> 20) for size in sizes)]))
    path.write_text("\n".join(lines) + "\n")
