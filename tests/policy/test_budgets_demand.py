"""What a pool is thought to need, over any history of its use: what is seen is covered, what is past is forgotten."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.budgets import PoolMemory, demand, remember
from orchestrator.policy.division import Pool
from orchestrator.policy.units import MIB

quick = settings(max_examples=60, derandomize=True, deadline=None)
LOOK_S = 0.25
BUNDLE = 112 * MIB
WIDE = Pool("a", "model-a", ("g",), BUNDLE, 0, 2000 * BUNDLE, 1.0, 2000 * BUNDLE, 0, 0, True, 0.0)

uses = st.lists(st.integers(0, 400), min_size=1, max_size=40)


def lived(uses: Sequence[int], pool: Pool = WIDE, queued: int = 0) -> tuple[Pool, PoolMemory]:
    """After one look for each of these uses, in bundles."""
    memory = None
    for number, used in enumerate(uses):
        pool = replace(pool, used_bytes=used * BUNDLE, queued_bytes=queued * BUNDLE)
        memory = remember(pool, memory, 100.0 + number * LOOK_S)
    assert memory is not None
    return pool, memory


@quick
@given(uses, st.integers(0, 400), st.booleans())
def test_use_and_queue_are_demand_whatever_was_before(uses: list[int], queued: int, busy: bool) -> None:
    pool, memory = lived(uses, replace(WIDE, busy=busy), queued)
    assert demand(pool, memory) >= (uses[-1] + queued + 2 * busy) * BUNDLE


@quick
@given(uses, st.integers(0, 2000), st.integers(0, 400))
def test_demand_is_whole_bundles_and_no_more_than_the_ceiling(uses: list[int], ceiling: int, queued: int) -> None:
    pool, memory = lived(uses, replace(WIDE, ceiling_bytes=ceiling * BUNDLE + 1), queued)
    assert demand(pool, memory) % BUNDLE == 0
    assert demand(pool, memory) <= max(1, ceiling) * BUNDLE


@quick
@given(st.integers(0, 200), st.integers(1, 20), st.integers(12, 40))
def test_one_that_grows_steadily_has_a_second_of_its_growth_ahead(first: int, step: int, looks: int) -> None:
    """From three seconds on: less is no rate yet. It needs it, because a limit is raised a look after it was needed, and obeyed later."""
    pool, memory = lived([first + step * look for look in range(looks)])
    assert demand(pool, memory) >= pool.used_bytes + 0.9 * step * BUNDLE / LOOK_S


@quick
@given(st.integers(0, 1000))
def test_one_that_stands_at_its_limit_may_have_twice_its_use(used: int) -> None:
    """How fast it would grow cannot be seen there."""
    pool, memory = lived([used] * 40, replace(WIDE, limit_bytes=(used + 1) * BUNDLE))
    assert demand(pool, memory) >= 2 * used * BUNDLE


@quick
@given(uses, st.integers(0, 400))
def test_a_peak_is_needed_again_for_some_seconds(uses: list[int], after: int) -> None:
    """The next request may be as large: a second later four fifths are still asked for."""
    pool, memory = lived([*uses, max(uses), *[after] * 4], replace(WIDE, busy=False))
    assert demand(pool, memory) >= max(after, 0.8 * max(uses)) * BUNDLE


@quick
@given(uses, st.integers(0, 400), st.booleans())
def test_a_minute_later_only_its_use_counts(uses: list[int], used: int, busy: bool) -> None:
    """With a quarter more for as long as it is busy: no growth and no peak is remembered."""
    pool, memory = lived([*uses, *[used] * 240], replace(WIDE, busy=busy))
    room = max(2.0, used / 4) if busy else 0.0
    assert demand(pool, memory) <= (used + room + 1) * BUNDLE
