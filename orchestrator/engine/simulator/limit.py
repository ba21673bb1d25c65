"""kvcached's revisioned limit, which an RPC reaches: applied at once, also when idle or starved, and acknowledged.

It clamps to the capacity of the start and is not written to the segment: a later allocation applies the segment's value
over it if that ever changed, so whoever uses this writes both.
"""

from __future__ import annotations

from typing import Any

from .pool import Pool

_REASONS = {"deferred": "inuse_capacity_above_limit", "conflict": "revision_reused_with_different_limit"}


class MemoryLimit:
    """`set_instance_memory_limit` of one pool: the highest revision wins, a lower one is stale."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._revision = -1
        self._limit_bytes: int | None = None
        self._effective_bytes: int | None = None

    def set(self, limit_bytes: int, revision: int) -> dict[str, Any]:
        if limit_bytes < 0 or revision < 0:
            name = "limit_bytes" if limit_bytes < 0 else "revision"
            raise ValueError(f"{name} must be non-negative")
        if revision < self._revision:
            return self._answer(limit_bytes, revision, "stale")
        if revision == self._revision and limit_bytes != self._limit_bytes:
            return self._answer(limit_bytes, revision, "conflict")
        if revision > self._revision:
            pages = min(limit_bytes // self._pool.bundle_bytes, self._pool.capacity_pages)
            self._pool.resize(pages)
            self._limit_bytes, self._revision = limit_bytes, revision
            self._effective_bytes = pages * self._pool.bundle_bytes
        return self._answer(limit_bytes, revision, "deferred" if self._pool.in_shrink else "applied")

    def _answer(self, limit_bytes: int, revision: int, status: str) -> dict[str, Any]:
        mapped, effective = self._pool.mapped_bytes, self._effective_bytes or 0
        shared = {
            "status": status,
            "reason": _REASONS.get(status, ""),
            "effective_limit_bytes": effective,
            "mapped_bytes": mapped,
            "remaining_bytes": max(0, effective - mapped),
            "overage_bytes": max(0, mapped - effective),
        }
        state = shared | {
            "pool_name": "block_pool",
            "group_id": 0,
            "limit_bytes": self._limit_bytes,
            "current_capacity_bytes": self._pool.total * self._pool.bundle_bytes,
            "revision": self._revision,
        }
        return shared | {"limit_bytes": limit_bytes, "revision": revision, "pools": [state]}


def no_pool(limit_bytes: int, revision: int) -> dict[str, Any]:
    """The answer of an engine without kvcached."""
    return {
        "status": "unavailable",
        "reason": "no_registered_kv_cache_pool",
        "limit_bytes": limit_bytes,
        "effective_limit_bytes": 0,
        "revision": revision,
        "mapped_bytes": 0,
        "remaining_bytes": 0,
        "overage_bytes": 0,
        "pools": [],
    }
