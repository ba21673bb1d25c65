"""The pool against a trace that the real allocator of kvcached 0.1.6 gave (Qwen2.5-0.5B: bundles of 96 MiB, 213 pages).

Pure: the card and the segment are numbers here.
"""

from __future__ import annotations

import pytest

from orchestrator.engine.simulator.gpu import OutOfMemory
from orchestrator.engine.simulator.limit import MemoryLimit
from orchestrator.engine.simulator.pool import Pool, PoolCorrupted

MIB = 2**20
BUNDLE = 96 * MIB
PAGE = 512  # blocks


class Card:
    """Bundles free on a card, and what of them this pool took."""

    def __init__(self, free: int = 1000) -> None:
        self.free = free
        self.taken = 0
        self.promised: int | None = None  # what it says is free, when that is not the truth any more

    def map_bundles(self, count: int) -> None:
        if count > self.free:
            raise OutOfMemory("no")
        self.free -= count
        self.taken += count

    def unmap_bundles(self, count: int) -> None:
        self.free += count
        self.taken -= count

    def mappable_bundles(self) -> int:
        return self.free if self.promised is None else self.promised


class Segment:
    def __init__(self) -> None:
        self.mib = (0, 0)

    def publish(self, used_bytes: int, prealloc_bytes: int) -> None:
        self.mib = (used_bytes // MIB, prealloc_bytes // MIB)


class Rig:
    """A ready pool: null block reserved, minimum reserve mapped."""

    def __init__(self, pages: int = 213, free: int = 1000, low: int = 5, high: int = 10) -> None:
        self.card = Card(free)
        self.segment = Segment()
        self.pool = Pool(
            capacity_pages=pages,
            blocks_per_page=PAGE,
            bundle_bytes=BUNDLE,
            page_bytes=2 * MIB,
            physical=self.card,
            ledger=self.segment,
            min_reserved=low,
            max_reserved=high,
        )
        assert self.pool.reserve_null_block()
        self.pool.refill()

    def limit(self, pages: int) -> None:
        self.pool.observe(pages * BUNDLE)

    def alloc(self, blocks: int) -> dict[int, int]:
        got = self.pool.alloc(blocks)
        assert got is not None
        assert sum(got.values()) == blocks
        self.pool.refill()
        return got

    @property
    def state(self) -> tuple[int, int, int]:
        return self.pool.total, self.pool.in_use, self.pool.reserved

    @property
    def gpu_mib(self) -> int:
        """With the zero bundle, which the pool does not know."""
        return (self.card.taken + 1) * BUNDLE // MIB


def test_the_trace_of_the_real_allocator() -> None:
    rig = Rig()
    pool = rig.pool
    assert (rig.segment.mib, rig.state, rig.gpu_mib) == ((96, 480), (213, 1, 5), 672)

    rig.limit(3)
    assert (rig.segment.mib, rig.state, rig.gpu_mib) == ((96, 480), (213, 1, 5), 672)
    pool.free_blocks(rig.alloc(1))
    assert (rig.segment.mib, rig.state, rig.gpu_mib) == ((96, 0), (3, 1, 0), 192)

    assert pool.alloc(4 * PAGE) is None
    rig.limit(213)
    assert pool.available_blocks() < 4 * PAGE  # what a scheduler looks at before it would call alloc
    assert pool.total == 3
    pool.free_blocks(rig.alloc(1))
    assert pool.total == 213
    pool.free_blocks(rig.alloc(4 * PAGE))
    pool.trim()

    rig.limit(0)
    held = rig.alloc(5 * PAGE)
    assert (pool.in_use, rig.gpu_mib) == (6, 1152)

    rig.limit(2)
    one = rig.alloc(1)
    assert pool.in_shrink
    assert pool.available_blocks() == 510
    assert pool.alloc(511) is None
    pool.free_blocks(held)
    assert not pool.in_shrink
    assert (pool.total, rig.gpu_mib) == (2, 288)
    pool.free_blocks(one)


def test_physical_starvation_heals_by_itself() -> None:
    rig = Rig()
    rig.card.free = 2
    assert rig.pool.alloc(30 * PAGE) is None
    rig.pool.free_blocks(rig.alloc(2 * PAGE))
    rig.card.free = 100
    rig.alloc(30 * PAGE)


def test_a_page_lost_to_a_peer_is_a_miss_that_takes_nothing() -> None:
    rig = Rig(low=0, high=0)
    rig.card.free, rig.card.promised = 1, 100
    assert rig.pool.alloc(3 * PAGE) is None
    assert (rig.pool.in_use, rig.card.taken) == (1, 1)


def test_pages_beyond_the_maximum_reserve_are_unmapped() -> None:
    rig = Rig()
    rig.pool.free_blocks(rig.alloc(30 * PAGE))
    assert (rig.state, rig.gpu_mib) == ((213, 1, 10), 1152)
    rig.pool.trim()
    assert (rig.state, rig.gpu_mib) == ((213, 1, 0), 192)


def test_small_requests_live_on_the_null_page() -> None:
    rig = Rig()
    rig.alloc(PAGE - 1)
    assert rig.pool.in_use == 1
    rig.alloc(1)
    assert rig.pool.in_use == 2


def test_a_return_to_the_start_limit_is_seen() -> None:
    rig = Rig()
    rig.limit(3)
    rig.alloc(1)
    rig.limit(213)
    rig.alloc(1)
    assert rig.pool.total == 213


def test_a_limit_of_less_than_a_bundle_closes_the_pool() -> None:
    rig = Rig()
    rig.pool.observe(48)  # one byte for each K and V of each layer: the smallest that counts
    rig.alloc(1)
    assert rig.pool.in_shrink
    assert rig.pool.limit_bytes == 0


@pytest.mark.parametrize("total_bytes", [0, 47, -5])
def test_no_limit_at_all_is_ignored(total_bytes: int) -> None:
    rig = Rig()
    rig.pool.observe(total_bytes)
    rig.alloc(1)
    assert (rig.pool.in_shrink, rig.pool.total) == (False, 213)


def test_a_limit_above_the_start_is_fatal() -> None:
    rig = Rig()
    rig.limit(214)
    with pytest.raises(PoolCorrupted, match="214 pages is above the 213 pages"):
        rig.pool.alloc(1)


def test_the_null_block_waits_for_the_card() -> None:
    card = Card(free=0)
    pool = Pool(capacity_pages=4, blocks_per_page=PAGE, bundle_bytes=BUNDLE, page_bytes=2 * MIB, physical=card, ledger=Segment())
    assert not pool.reserve_null_block()
    card.free = 1
    assert pool.reserve_null_block()
    assert pool.null_block == {0: 1}


def test_the_revisioned_limit_applies_at_once_and_clamps() -> None:
    rig = Rig()
    limit = MemoryLimit(rig.pool)
    answer = limit.set(3 * BUNDLE + 7, 1)
    assert (answer["status"], answer["effective_limit_bytes"]) == ("applied", 3 * BUNDLE)
    assert (answer["mapped_bytes"], answer["remaining_bytes"]) == (BUNDLE, 2 * BUNDLE)
    assert rig.pool.total == 3
    assert limit.set(10_000 * BUNDLE, 2)["effective_limit_bytes"] == 213 * BUNDLE
    assert rig.pool.total == 213


def test_the_revisioned_limit_below_use_is_deferred_until_blocks_are_freed() -> None:
    rig = Rig()
    limit = MemoryLimit(rig.pool)
    held = rig.alloc(5 * PAGE)
    answer = limit.set(0, 1)
    assert (answer["status"], answer["reason"]) == ("deferred", "inuse_capacity_above_limit")
    assert answer["overage_bytes"] == answer["mapped_bytes"]
    assert limit.set(2 * BUNDLE, 2)["status"] == "deferred"
    rig.pool.free_blocks(held)
    assert limit.set(2 * BUNDLE, 2)["status"] == "applied"


def test_revisions() -> None:
    limit = MemoryLimit(Rig().pool)
    limit.set(5 * BUNDLE, 5)
    assert limit.set(6 * BUNDLE, 4)["status"] == "stale"
    assert limit.set(6 * BUNDLE, 5)["status"] == "conflict"
    assert limit.set(5 * BUNDLE, 5)["status"] == "applied"
    with pytest.raises(ValueError, match="limit_bytes must be non-negative"):
        limit.set(-1, 6)


def test_the_segments_limit_overrides_the_rpc_at_the_next_allocation() -> None:
    rig = Rig()
    rig.limit(100)
    rig.alloc(1)
    MemoryLimit(rig.pool).set(4 * BUNDLE, 1)
    assert rig.pool.total == 4
    rig.alloc(1)
    assert rig.pool.total == 100
