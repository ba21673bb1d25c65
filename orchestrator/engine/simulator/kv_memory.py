"""The card and the segment as a pool sees them: page bundles to map, and a place to tell what is mapped.

The free memory of the card is read at most every 100 ms, and again after each change of our own, as kvcached does it.
"""

from __future__ import annotations

import time

from .gpu import GpuGroup
from .segment import Segment

_FREE_TTL_S = 0.1


class KvMemory:
    """Elastic KV memory: `mappable_bundles` leaves 1 - KVCACHED_GPU_UTILIZATION of the card free."""

    def __init__(self, gpus: GpuGroup, bundle_bytes: int, utilization: float, segment: Segment) -> None:
        self._gpus = gpus
        self._bundle_bytes = bundle_bytes
        self._headroom_bytes = int(gpus.total_bytes * (1.0 - utilization))
        self._segment = segment
        self._mappable = 0
        self._read_at = float("-inf")

    def map_bundles(self, count: int) -> None:
        self._read_at = float("-inf")
        self._gpus.take(count * self._bundle_bytes)

    def unmap_bundles(self, count: int) -> None:
        self._read_at = float("-inf")
        self._gpus.give(count * self._bundle_bytes)

    def mappable_bundles(self) -> int:
        now = time.monotonic()
        if now - self._read_at >= _FREE_TTL_S:
            self._mappable = max(0, self._gpus.free_bytes() - self._headroom_bytes) // self._bundle_bytes
            self._read_at = now
        return self._mappable

    def publish(self, used_bytes: int, prealloc_bytes: int) -> None:
        self._segment.publish(used_bytes, prealloc_bytes)


class StaticMemory:
    """Plain vLLM's KV memory: all of it was taken at the start, and nobody is told."""

    def map_bundles(self, count: int) -> None:
        pass

    def unmap_bundles(self, count: int) -> None:
        pass

    def mappable_bundles(self) -> int:
        return 2**31

    def publish(self, used_bytes: int, prealloc_bytes: int) -> None:
        pass
