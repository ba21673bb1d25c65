"""The scheduler over a real pool: who runs, who waits, who is preempted, and what the prefix cache keeps in use."""

from __future__ import annotations

from orchestrator.engine.simulator.scheduler import Job, PrefixCache, Scheduler

from .test_pool import BUNDLE, PAGE, Rig

BLOCK = 16
PAGE_TOKENS = PAGE * BLOCK


def make(rig: Rig, *, cached_blocks: int | None = None, seqs: int = 256) -> Scheduler:
    cache = None if cached_blocks is None else PrefixCache(rig.pool, cached_blocks)
    return Scheduler(rig.pool, cache, block_size=BLOCK, max_num_seqs=seqs)


def add(scheduler: Scheduler, number: int, prompt: int, tokens: int = 4, key: int | None = None) -> Job:
    job = Job(number, prompt, tokens, number if key is None else key)
    scheduler.add(job)
    return job


def test_a_request_makes_one_token_a_step_and_ends() -> None:
    scheduler = make(Rig())
    job = add(scheduler, 1, 10, tokens=3)
    assert [scheduler.step()[0].generated for _ in range(3)] == [1, 2, 3]
    assert job.finish_reason == "length"
    assert (scheduler.prompt_tokens, scheduler.generation_tokens, scheduler.busy) == (10, 3, False)
    assert scheduler.pool.in_use == 1


def test_the_wedge_and_its_cure() -> None:
    rig = Rig()
    scheduler = make(rig)
    rig.limit(2)
    rig.alloc(1)
    big = add(scheduler, 1, 3 * PAGE_TOKENS)
    small = add(scheduler, 2, 1)
    assert scheduler.step() == []
    rig.limit(213)
    assert scheduler.step() == []
    assert list(scheduler.waiting) == [big, small]
    rig.pool.resize(213)
    assert scheduler.step() == [big, small]


def test_a_running_request_applies_the_limit_for_a_waiting_one() -> None:
    rig = Rig()
    scheduler = make(rig)
    running = add(scheduler, 1, 15, tokens=10_000)
    scheduler.step()
    rig.pool.resize(2)
    waiting = add(scheduler, 2, 3 * PAGE_TOKENS, tokens=100)
    rig.limit(200)
    for _ in range(BLOCK + 2):
        scheduler.step()
    assert scheduler.running == [running, waiting]


def test_the_newest_is_preempted_and_resumes_where_it_was() -> None:
    rig = Rig(pages=2, low=0, high=0)
    scheduler = make(rig)
    old = add(scheduler, 1, PAGE_TOKENS // 2, tokens=PAGE_TOKENS)
    young = add(scheduler, 2, PAGE_TOKENS, tokens=PAGE_TOKENS)
    while not scheduler.preemptions:
        scheduler.step()
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young]
    made = young.generated
    while old.finish_reason is None:
        scheduler.step()
    assert young.generated == made
    scheduler.step()
    assert young.generated == made + 1


def test_a_prompt_in_chunks_takes_its_pages_one_by_one_and_holds_up_the_next() -> None:
    rig = Rig()
    scheduler = make(rig)
    scheduler.prefill_tokens = PAGE_TOKENS
    big, small = add(scheduler, 1, 3 * PAGE_TOKENS, tokens=2), add(scheduler, 2, 1, tokens=1)
    used: list[int] = []
    while big.generated == 0:
        assert (small.generated, scheduler.generation_tokens) == (0, 0)
        scheduler.step()
        used.append(rig.pool.in_use)
    assert len(used) == len(set(used)) == 3
    assert used == sorted(used)
    scheduler.step()
    assert small.finish_reason == "length"


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make(Rig(), seqs=2)
    for number in range(3):
        add(scheduler, number, 1)
    assert len(scheduler.step()) == 2
    assert len(scheduler.waiting) == 1


def test_the_prefix_cache_keeps_blocks_in_use_up_to_its_cap() -> None:
    rig = Rig()
    scheduler = make(rig, cached_blocks=PAGE)
    for number in range(3):
        add(scheduler, number, PAGE_TOKENS, tokens=1)
        scheduler.step()
    assert scheduler.cache is not None
    assert scheduler.cache.blocks == PAGE
    assert rig.pool.in_use > 1
    scheduler.drop_cache()
    assert (scheduler.cache.blocks, rig.pool.in_use) == (0, 1)


def test_the_same_prompt_is_cached_once() -> None:
    scheduler = make(Rig(), cached_blocks=-1)
    for _ in range(3):
        add(scheduler, 1, 160, tokens=1)
        scheduler.step()
    assert scheduler.cache is not None
    assert scheduler.cache.blocks == 10


def test_cached_blocks_give_way_to_requests() -> None:
    rig = Rig(pages=3, low=0, high=0)
    scheduler = make(rig, cached_blocks=-1)
    add(scheduler, 1, 2 * PAGE_TOKENS, tokens=1)
    scheduler.step()
    assert rig.pool.in_use == 3
    job = add(scheduler, 2, 2 * PAGE_TOKENS, tokens=1)
    scheduler.step()
    assert job.finish_reason == "length"


def test_a_shrink_does_not_evict_the_cache() -> None:
    rig = Rig()
    scheduler = make(rig, cached_blocks=-1)
    add(scheduler, 1, 4 * PAGE_TOKENS, tokens=1)
    scheduler.step()
    rig.limit(2)
    add(scheduler, 2, 1, tokens=1)
    scheduler.step()
    assert rig.pool.in_use * BUNDLE > 2 * BUNDLE
    assert rig.pool.in_shrink
    scheduler.drop_cache()
    assert (rig.pool.in_shrink, rig.pool.total) == (False, 2)


def test_abort_frees_and_counts() -> None:
    rig = Rig()
    scheduler = make(rig)
    job = add(scheduler, 1, 2 * PAGE_TOKENS, tokens=100)
    scheduler.step()
    assert scheduler.abort(1) is job
    assert scheduler.abort(1) is None
    assert (job.finish_reason, scheduler.finished["abort"], rig.pool.in_use) == ("abort", 1, 1)
