"""Limits a minute as a bucket: never more than it holds and what fills it, never less, and who waits as long as he is told is let in."""

import math
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.allowance import DAY_S, MINUTE_S, NEVER_USED, day, month_begins, month_ends, name_of, taken, wait_s

pure = settings(derandomize=True, deadline=None)
LIMITS = st.integers(1, 600)
STARTS = st.sampled_from([0.0, 12.5, 1e7])
GAPS = st.lists(st.floats(0.0, 90.0), max_size=200)


@pure
@given(STARTS, st.integers(1, 3000))
def test_so_many_may_come_at_once_and_no_more(now: float, limit: int) -> None:
    full_at = NEVER_USED
    for _ in range(limit):
        assert wait_s(full_at, now, limit) == 0.0
        full_at = taken(full_at, now, limit, 1)
    assert math.isclose(wait_s(full_at, now, limit), MINUTE_S / limit, rel_tol=0.01)
    assert wait_s(full_at, now + MINUTE_S, limit) == 0.0


@pure
@given(LIMITS, STARTS, GAPS)
def test_in_any_stretch_of_time_no_more_than_it_holds_and_what_fills_it(limit: int, now: float, gaps: list[float]) -> None:
    full_at, let_in = NEVER_USED, list[float]()
    for gap in gaps:
        now += gap
        for _ in range(limit // 8 + 1):
            if not wait_s(full_at, now, limit):
                full_at = taken(full_at, now, limit, 1)
                let_in.append(now)
    for first in range(0, len(let_in), 7):
        for last in range(first, len(let_in), 5):
            stretch = let_in[last] - let_in[first]
            assert last - first + 1 <= limit + limit * stretch / MINUTE_S + 0.02


@pure
@given(LIMITS, STARTS, GAPS, st.integers(0, 5000))
def test_who_waits_as_long_as_he_is_told_is_let_in_and_no_sooner(limit: int, now: float, gaps: list[float], cost: int) -> None:
    full_at = NEVER_USED
    for gap in gaps[:50]:
        now += gap
        told = wait_s(full_at, now, limit)
        assert told >= 0.0
        if told:
            assert wait_s(full_at, now + told, limit) == 0.0
            one_s = MINUTE_S / limit
            if told > one_s / 10:
                assert wait_s(full_at, now + told - one_s / 20, limit) > 0
        else:
            full_at = taken(full_at, now, limit, cost)


@pure
@given(LIMITS, STARTS, st.integers(1, 100_000))
def test_what_costs_more_than_there_was_is_waited_out(limit: int, now: float, cost: int) -> None:
    full_at = taken(NEVER_USED, now, limit, cost)
    missing = cost - limit + 1  # until it holds one
    assert math.isclose(wait_s(full_at, now, limit), max(0.0, MINUTE_S * missing / limit), rel_tol=1e-6, abs_tol=0.01)


@pure
@given(st.datetimes(datetime(1970, 1, 1), datetime(2400, 1, 1)))
def test_days_and_months_are_those_of_utc(moment: datetime) -> None:
    moment = moment.replace(tzinfo=UTC)
    at = (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
    assert name_of(day(at)) == moment.date().isoformat()
    assert name_of(month_begins(at)) == moment.date().replace(day=1).isoformat()
    end = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=month_ends(at))
    assert end > moment
    assert (end.day, end.hour, end.minute, end.second) == (1, 0, 0, 0)
    assert (end - timedelta(seconds=1)).month == moment.month
    assert end - moment <= timedelta(days=31)
    assert day(month_ends(at)) == month_begins(month_ends(at))
    assert month_begins(at) * DAY_S <= at
