"""vLLM's scheduler as far as memory goes: first come first served, whole prompts, the newest preempted.

The check before an allocation reads the free blocks of the limit applied last and touches nothing when it fails. So a
request that does not fit blocks all behind it, and with nothing running no allocation happens that could apply a larger
limit: the wedge. Pure: a step is called, time is not known.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from .pool import Blocks, Pool


@dataclass
class Job:
    """One request in the engine; `ordinal` counts requests from 1."""

    id: int
    prompt_tokens: int
    max_tokens: int
    prompt_key: int
    ordinal: int = 0
    generated: int = 0
    computed: int = 0  # tokens of its prompt, where that is computed in chunks
    blocks: Blocks = field(default_factory=dict)
    finish_reason: str | None = None

    def blocks_needed(self, block_size: int, chunk: int = 0) -> int:
        """Blocks for all tokens so far and the next one, less those held; while its prompt is computed in chunks, for the next of them."""
        tokens = self.prompt_tokens + self.generated + 1
        if chunk and self.computed < self.prompt_tokens:
            tokens = min(tokens, self.computed + chunk)
        return -(-tokens // block_size) - sum(self.blocks.values())


class PrefixCache:
    """Blocks of finished requests, kept in use until needed, dropped oldest first beyond `cap_blocks` (-1: no cap)."""

    def __init__(self, pool: Pool, cap_blocks: int) -> None:
        self.blocks = 0
        self._pool = pool
        self._cap_blocks = cap_blocks
        self._entries: OrderedDict[int, Blocks] = OrderedDict()

    def keep(self, key: int, blocks: Blocks) -> None:
        if not blocks:
            return
        self._drop(key)  # The same prompt again: its blocks are the same blocks.
        self._entries[key] = blocks
        self.blocks += sum(blocks.values())
        if self._cap_blocks >= 0:
            self.evict(self.blocks - self._cap_blocks)

    def evict(self, count: int) -> None:
        while count > 0 and self._entries:
            oldest = next(iter(self._entries))
            surplus = _split(self._entries[oldest], count)
            freed = sum(surplus.values())
            self.blocks -= freed
            count -= freed
            if not self._entries[oldest]:
                del self._entries[oldest]
            self._pool.free_blocks(surplus)

    def clear(self) -> None:
        self.evict(self.blocks)

    def _drop(self, key: int) -> None:
        blocks = self._entries.pop(key, None)
        if blocks is not None:
            self.blocks -= sum(blocks.values())
            self._pool.free_blocks(blocks)


class Scheduler:
    """`step` makes one token for each running request and says which requests moved."""

    def __init__(self, pool: Pool, cache: PrefixCache | None, *, block_size: int, max_num_seqs: int) -> None:
        self.pool = pool
        self.cache = cache
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.paused = False
        self.prefill_tokens = 0  # of one prompt in a step; 0: whole prompts
        self.added = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, job: Job) -> None:
        self.added += 1
        job.ordinal = self.added
        self.waiting.append(job)

    def abort(self, job_id: int) -> Job | None:
        for job in [*self.running, *self.waiting]:
            if job.id == job_id:
                self._end(job, "abort")
                return job
        return None

    def abort_all(self) -> list[Job]:
        jobs = [*self.running, *self.waiting]
        for job in jobs:
            self._end(job, "abort")
        return jobs

    def drop_cache(self) -> None:
        if self.cache is not None:
            self.cache.clear()

    def free_blocks(self) -> int:
        return self.pool.available_blocks() + (self.cache.blocks if self.cache else 0)

    def step(self) -> list[Job]:
        if self.paused:
            return []
        if not self._grow_running():
            self._admit()
        moved = [job for job in self.running if not self._still_reads(job)]
        for job in moved:
            if job.generated == 0:
                self.prompt_tokens += job.prompt_tokens
            job.generated += 1
            self.generation_tokens += 1
            if job.generated >= job.max_tokens:
                self._end(job, "length")
        return moved

    def _grow_running(self) -> bool:
        """Blocks for the running ones, oldest first; True when one had to be preempted for it."""
        preempted = False
        index = 0
        while index < len(self.running):
            job = self.running[index]
            if self._take_blocks(job):
                index += 1
                continue
            newest = self.running.pop()
            self._release(newest)
            newest.computed = 0
            self.waiting.appendleft(newest)
            self.preemptions += 1
            preempted = True
        return preempted

    def _still_reads(self, job: Job) -> bool:
        """Its prompt has had its next chunk, and that was not the last."""
        chunk = self.prefill_tokens
        job.computed = min(job.prompt_tokens, job.computed + chunk) if chunk else job.prompt_tokens
        return job.computed < job.prompt_tokens

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            if self.prefill_tokens and any(job.computed < job.prompt_tokens for job in self.running):
                return  # it has the whole step
            if not self._take_blocks(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def _take_blocks(self, job: Job) -> bool:
        need = job.blocks_needed(self._block_size, self.prefill_tokens)
        if need <= 0:
            return True
        if need > self.free_blocks():
            return False
        for _ in range(2):  # A new limit applied by the first try may leave too little for it: evict, then once more.
            if self.cache is not None:
                self.cache.evict(need - self.pool.available_blocks())
            blocks = self.pool.alloc(need)
            if blocks is not None:
                for page, count in blocks.items():
                    job.blocks[page] = job.blocks.get(page, 0) + count
                return True
        return False

    def _end(self, job: Job, reason: str) -> None:
        job.finish_reason = reason
        self.finished[reason] += 1
        if job in self.running:
            self.running.remove(job)
        if job in self.waiting:
            self.waiting.remove(job)
        if self.cache is not None:
            full = (job.prompt_tokens + job.generated) // self._block_size
            self.cache.keep(job.prompt_key, _split(job.blocks, full))
        self._release(job)

    def _release(self, job: Job) -> None:
        blocks, job.blocks = job.blocks, {}
        self.pool.free_blocks(blocks)


def _split(blocks: Blocks, count: int) -> Blocks:
    """Take up to `count` blocks out of `blocks`, page by page in the order they were given."""
    taken: Blocks = {}
    for page in list(blocks):
        if count <= 0:
            break
        taken[page] = min(count, blocks[page])
        count -= taken[page]
        blocks[page] -= taken[page]
        if not blocks[page]:
            del blocks[page]
    return taken
