"""kvcached's pool: which pages are mapped, which blocks of them are used, and when a limit takes effect.

Pure: the card and the segment are passed in, time is not known. It follows kvcached 0.1.6's KVCacheManager and
PageAllocator rule for rule, the awkward ones too: a limit written to the segment is applied inside an allocation and
nowhere else, so an idle pool never shrinks and a starved one never grows.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from .gpu import OutOfMemory

Blocks = dict[int, int]
"""Blocks held, by page: how many of that page's blocks."""


class PoolCorrupted(Exception):
    """The pool was grown past its start: page ids that no tensor has, or two requests on one page."""


class Physical(Protocol):
    """The card, in page bundles."""

    def map_bundles(self, count: int) -> None:
        """Take so many; OutOfMemory when the card has not so many, and then none is taken."""

    def unmap_bundles(self, count: int) -> None: ...

    def mappable_bundles(self) -> int:
        """How many more may be mapped, with the headroom of KVCACHED_GPU_UTILIZATION left free."""


class Ledger(Protocol):
    """The segment, as far as the pool writes it."""

    def publish(self, used_bytes: int, prealloc_bytes: int) -> None: ...


class Pool:
    """`total` pages may be used now (the applied limit); `free` of them are not; `reserved` are mapped but unused."""

    def __init__(
        self,
        *,
        capacity_pages: int,
        blocks_per_page: int,
        bundle_bytes: int,
        page_bytes: int,
        physical: Physical,
        ledger: Ledger,
        min_reserved: int = 5,
        max_reserved: int = 10,
    ) -> None:
        self.capacity_pages = capacity_pages
        self.blocks_per_page = blocks_per_page
        self.bundle_bytes = bundle_bytes
        self.page_bytes = page_bytes
        self.total = capacity_pages
        self.free = capacity_pages
        self.in_shrink = False
        self.shrink_target = 0
        self.null_block: Blocks | None = None
        self._physical = physical
        self._ledger = ledger
        self._min_reserved = min(min_reserved, capacity_pages)
        self._max_reserved = min(max_reserved, capacity_pages)
        self._unmapped: deque[int] = deque(range(capacity_pages))
        self._reserved: deque[int] = deque()
        self._reclaimed: deque[int] = deque()
        self._open: dict[int, int] = {}  # mapped pages with free blocks: how many
        self._full: set[int] = set()
        self._refill_due = False
        self._observed = self._layer_bytes(capacity_pages * bundle_bytes)
        self._target = -1

    @property
    def in_use(self) -> int:
        return self.total - self.free

    @property
    def reserved(self) -> int:
        return len(self._reserved)

    @property
    def mapped_bytes(self) -> int:
        return (self.in_use + self.reserved) * self.bundle_bytes

    @property
    def limit_bytes(self) -> int:
        """The limit that the pool obeys or is draining towards."""
        return (self.shrink_target if self.in_shrink else self.total) * self.bundle_bytes

    @property
    def watched_bytes(self) -> int:
        """The limit that the watcher saw last; before the segment ever changed, that is the capacity."""
        pages = self.capacity_pages if self._target < 0 else self._target // self.page_bytes
        return pages * self.bundle_bytes

    def available_blocks(self) -> int:
        """What an allocation may ask for: bounded by the limit applied last, and by the card."""
        partial = sum(self._open.values())
        if self.in_shrink:
            return partial
        pages = min(self.free, self._physical.mappable_bundles() + self.reserved)
        return partial + pages * self.blocks_per_page

    def observe(self, segment_total_bytes: int) -> None:
        """What the watcher does every 100 ms: remember a changed limit, for the next allocation to apply."""
        target = self._layer_bytes(segment_total_bytes)
        if target >= 0 and target != self._observed:
            self._observed = self._target = target

    def reserve_null_block(self) -> bool:
        """The first block pins page 0 for life. False while the card has no page to give."""
        if self.null_block is None and self.available_blocks() >= 1:
            self.null_block = self.alloc(1)
            self._refill_due = self._refill_due or self.null_block is not None
        return self.null_block is not None

    def alloc(self, need: int) -> Blocks | None:
        if self._target > 0:
            self.resize(self._target // self.page_bytes)
        if self.available_blocks() < need:
            return None
        blocks: Blocks = {}
        while need > 0:
            if not self._open and not self._open_page():
                self.free_blocks(blocks)
                return None
            page = self._best_page(need)
            count = min(need, self._open[page])
            self._open[page] -= count
            if not self._open[page]:
                del self._open[page]
                self._full.add(page)
            blocks[page] = blocks.get(page, 0) + count
            need -= count
        return blocks

    def free_blocks(self, blocks: Blocks) -> None:
        """Give blocks back; pages left empty are kept as reserve up to the maximum, the rest are unmapped."""
        if not blocks:
            return
        emptied: list[int] = []
        for page, count in blocks.items():
            self._full.discard(page)
            self._open[page] = self._open.get(page, 0) + count
            if self._open[page] == self.blocks_per_page:
                del self._open[page]
                emptied.append(page)
        if emptied:
            keep = max(0, self._max_reserved - self.reserved)
            self._reserved.extend(emptied[:keep])
            self._unmap(emptied[keep:])
            self.free += len(emptied)
            self._publish()
        if self.in_shrink and self._resize(self.shrink_target):
            self.in_shrink = False

    def resize(self, pages: int) -> bool:
        """Apply a limit now. False: more pages are in use; no new ones are given, and it ends when blocks are freed."""
        if self._resize(pages):
            self.in_shrink = False
            return True
        self.in_shrink = True
        self.shrink_target = pages
        return False

    def trim(self) -> None:
        reserved, self._reserved = list(self._reserved), deque()
        self._unmap(reserved)
        self._publish()

    def refill(self) -> None:
        """What the prealloc thread does when pages were taken: map up to the minimum reserve, if the card has them."""
        if not self._refill_due:
            return
        self._refill_due = False
        count = min(self._min_reserved - self.reserved, len(self._unmapped), self._physical.mappable_bundles())
        if count <= 0:
            return
        try:
            self._physical.map_bundles(count)
        except OutOfMemory:
            return
        self._reserved.extend(self._unmapped.popleft() for _ in range(count))
        self._publish()

    def _open_page(self) -> bool:
        """Make one more page usable: a reserved one, or one mapped now (False: none left, or the card is full)."""
        if self._reserved:
            page = self._reserved.popleft()
            self._refill_due = self._refill_due or self.reserved < self._min_reserved
        else:
            if not self._unmapped:
                return False
            try:
                self._physical.map_bundles(1)  # A peer may have taken the page since the check: a miss, no error.
            except OutOfMemory:
                return False
            page = self._unmapped.popleft()
            self._refill_due = True
        self.free -= 1
        self._open[page] = self.blocks_per_page
        self._publish()
        return True

    def _best_page(self, need: int) -> int:
        """The smallest rest that holds all of it, else the emptiest page: a request stays on few pages."""
        fitting = [page for page, blocks in self._open.items() if blocks >= need]
        if fitting:
            return min(fitting, key=self._open.__getitem__)
        return max(self._open, key=self._open.__getitem__)

    def _resize(self, pages: int) -> bool:
        if pages < self.in_use:
            return False
        if pages > self.capacity_pages:
            raise PoolCorrupted(f"limit of {pages} pages is above the {self.capacity_pages} pages of the start")
        if pages > self.total:
            grown = pages - self.total
            self._unmapped.extend(self._reclaimed.popleft() for _ in range(grown))
            self.free += grown
            self.total = pages
            self._publish()
        elif pages < self.total:
            if len(self._unmapped) < self.total - pages:
                self.trim()  # All of the reserve goes, not just what is needed.
            gone = self.total - pages
            self._reclaimed.extend(self._unmapped.pop() for _ in range(gone))
            self.free -= gone
            self.total = pages
        return True

    def _unmap(self, pages: list[int]) -> None:
        if pages:
            self._physical.unmap_bundles(len(pages))
            self._unmapped.extend(pages)

    def _publish(self) -> None:
        self._ledger.publish(self.in_use * self.bundle_bytes, self.reserved * self.bundle_bytes)

    def _layer_bytes(self, total_bytes: int) -> int:
        """A limit as kvcached compares it: the share of one layer's K or V (0 for one below a byte each: ignored)."""
        return total_bytes // (self.bundle_bytes // self.page_bytes)
