"""Who asks what and when: the same seed makes the same requests, and they are as many, as popular and as long as they should be."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.experiments.arrivals import TRACES, Lengths, mix, on_off, shares, times

pure = settings(derandomize=True, deadline=None)


@pure
@given(st.integers(1, 200), st.floats(0, 4))
def test_shares_add_up_and_fall(count: int, alpha: float) -> None:
    found = shares(count, alpha)
    assert math.isclose(sum(found), 1.0)
    assert found == sorted(found, reverse=True)


def test_the_second_of_zipf_is_asked_half_as_often() -> None:
    first, second, third = shares(3, 1.0)
    assert math.isclose(first, 2 * second)
    assert math.isclose(first, 3 * third)


@pure
@given(st.floats(0.01, 50), st.floats(0, 10), st.floats(1, 300), st.integers())
def test_as_many_come_as_the_rate_says_within_the_time_and_in_order(rate: float, variation: float, seconds: float, seed: int) -> None:
    found = times(rate, variation, seconds, random.Random(seed))
    assert abs(len(found) - rate * seconds) <= 1
    assert found == sorted(found)
    assert all(0 <= at < seconds for at in found)


@pytest.mark.parametrize(("variation", "least", "most"), [(0.0, 0.0, 0.01), (1.0, 0.9, 1.1), (3.0, 2.5, 3.5)])
def test_the_gaps_vary_as_they_should(variation: float, least: float, most: float) -> None:
    found = times(10, variation, 2000, random.Random(7))
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert least <= statistics.stdev(gaps) / statistics.mean(gaps) <= most


@pytest.mark.parametrize(("at", "then"), [(0.0, 0.0), (9.9, 9.9), (10.0, 15.0), (25.0, 35.0)])
def test_nobody_comes_in_a_pause(at: float, then: float) -> None:
    assert on_off([at], 10, 5) == [then]


def test_without_pauses_nothing_moves() -> None:
    assert on_off([1.0, 20.0], 0, 0) == [1.0, 20.0]


@pytest.mark.parametrize("lengths", [each for trace in TRACES.values() for each in (trace.prompt, trace.answer)])
def test_lengths_have_the_median_of_the_trace_and_its_tail(lengths: Lengths) -> None:
    dice = random.Random(3)
    drawn = sorted(lengths.draw(dice) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(lengths.p50, rel=0.1)
    assert drawn[18_000] == pytest.approx(lengths.p90, rel=0.35)  # one log-normal does not go through both
    assert drawn[19_800] == pytest.approx(lengths.p99, rel=0.75)


@pure
@given(st.integers(1, 8), st.integers(), st.floats(0.1, 5), st.sampled_from(["conversation", "code"]))
def test_a_mix_is_repeatable_and_in_order(count: int, seed: int, rate: float, trace: str) -> None:
    names = [f"m{number}" for number in range(count)]

    def made() -> list[object]:
        return [*mix(names, TRACES[trace], rate=rate, seconds=60, alpha=1, variation=3, on_s=10, off_s=10, seed=seed)]

    found = mix(names, TRACES[trace], rate=rate, seconds=60, alpha=1, variation=3, on_s=10, off_s=10, seed=seed)
    assert made() == [*found]
    assert [request.at_s for request in found] == sorted(request.at_s for request in found)
    assert all(request.at_s % 20 <= 10 + 1e-6 and request.prompt_tokens >= 2 and request.answer_tokens >= 2 for request in found)
