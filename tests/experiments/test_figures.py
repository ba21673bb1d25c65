"""Figures are what was measured: percentiles are values that were there, memory at rest is the least, goodput counts what was promised."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.experiments import figures, mix
from orchestrator.experiments.answers import Answer
from orchestrator.experiments.arrivals import Request
from orchestrator.experiments.record import Record, figures_of
from orchestrator.experiments.samples import Sample
from orchestrator.experiments.static_engine import telling

MIB = 1 << 20
pure = settings(derandomize=True, deadline=None)


def answer(first_s: float = 0.1, total_s: float = 1.0, tokens: int = 10, at_s: float = 0.0, error: str | None = None) -> Answer:
    return Answer("qwen", at_s, None if error else first_s, total_s, 0 if error else tokens, error, error)


def sample(used_mib: int, at_s: float = 0.0) -> Sample:
    return Sample(at_s, used_mib * MIB)


@pure
@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_value_that_was_measured(values: list[float], share: float) -> None:
    found = figures.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.95, 4.0), (0.25, 1.0), (1.0, 4.0)])
def test_percentiles_by_nearest_rank(share: float, value: float) -> None:
    assert figures.percentile([4.0, 1.0, 3.0, 2.0], share) == value


def test_nothing_measured_is_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def test_memory_at_rest_at_its_peak_and_between() -> None:
    found = figures.memory([sample(500), sample(480)], [sample(490), sample(900)], [sample(700), sample(510)])
    assert found == {"idle_mib": 480, "peak_mib": 900, "flex_mib": 420, "end_mib": 510}


def test_what_was_not_reached_is_not_told() -> None:
    assert figures.memory([sample(500)], [], []) == {"idle_mib": 500}


def test_a_failed_request_is_in_no_time() -> None:
    assert figures.times([answer(total_s=1.0), answer(total_s=99.0, error="cut")])["latency_p99_s"] == 1.0


def test_pauses_are_no_work() -> None:
    bursts = [[answer(at_s=0.0, total_s=1.0), answer(at_s=0.0, total_s=2.0)], [answer(at_s=100.0, total_s=2.0)]]
    assert figures.throughput(bursts) == 30 / 4


@pytest.mark.parametrize(
    ("one", "kept"),
    [
        (answer(0.1, 1.0, 10), True),
        (answer(0.3, 1.0, 10), False),  # the first token
        (answer(0.1, 4.0, 10), False),  # the pace
        (answer(0.1, 0.1, 1), True),  # one token has no pace
        (answer(error="timeout"), False),
    ],
)
def test_what_was_promised_is_first_token_and_pace(one: Answer, kept: bool) -> None:
    assert figures.within(one, 0.2, 0.2) is kept
    assert figures.goodput([one], {"qwen": (0.2, 0.2)}, 2.0) == {"goodput": float(kept), "goodput_per_s": kept / 2}


def test_refusals_by_code() -> None:
    assert figures.refusals([answer(error="queue_full"), answer(), answer(error="queue_full")]) == {"queue_full": 2}


@pytest.mark.parametrize(("ours", "static", "empty", "saved"), [(2, 10, 1, 8 / 9), (10, 10, 0, 0.0), (5, 1, 1, None)])
def test_what_is_saved_is_counted_above_the_empty_card(ours: float, static: float, empty: float, saved: float | None) -> None:
    assert figures.saving(ours, static, empty) == (pytest.approx(saved) if saved is not None else None)


def test_both_arms_are_compared_and_half_a_run_tells_what_it_has() -> None:
    record = Record(samples=[sample(300, 1.0), sample(500, 3.0), sample(2100, 11.0), sample(2100, 13.0)], empty_bytes=[100 * MIB])
    for name, begin in (("daemon", 0.0), ("static", 10.0)):
        arm = record.begin(name, 0, begin)
        arm.idle = (begin, begin + 2)
        arm.bursts, arm.answers = [("qwen", begin + 2.5, begin + 4)], [[answer(total_s=1.0 if name == "daemon" else 2.0)]]
    found = figures_of(record, ["qwen"])
    assert (found["daemon_flex_mib"], found["static_flex_mib"], found["latency_ratio"]) == (200, 0, 0.5)
    assert found["idle_saving_vs_static"] == pytest.approx(0.9)
    record.arms.pop()
    assert figures_of(record, ["qwen"]).keys() & {"idle_saving_vs_static", "latency_ratio"} == set()


@pytest.mark.parametrize(
    ("given", "longest", "then"),
    [((4000, 900), None, (4000, 900)), ((4000, 900), 2000, (1099, 900)), ((10, 5000), 100, (10, 50)), ((9, 9), 4, (1, 2))],
)
def test_a_request_fits_its_model(given: tuple[int, int], longest: int | None, then: tuple[int, int]) -> None:
    found = mix.fitted(Request(0.0, "qwen", *given), longest)
    assert (found.prompt_tokens, found.answer_tokens) == then


def test_a_promise_is_what_a_model_needs_alone_times_a_factor() -> None:
    plan = mix.Plan(rate=1, seconds=1, alpha=1, variation=1, tpot_s=0.05)
    assert mix.promise(plan, [answer(first_s=0.1), answer(first_s=0.2)]) == (1.0, 0.05)
    assert mix.promise(plan, [answer(error="cut")]) == (float("inf"), 0.05)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["INFO a", "ValueError: Free memory is less", "RuntimeError: Engine core initialization failed. See above"],
            "ValueError: Free memory",
        ),
        (["x torch.OutOfMemoryError: CUDA out of memory", "KeyboardInterrupt: terminated"], "x torch.OutOfMemoryError"),
        (["just words", ""], "just words"),
    ],
)
def test_the_line_of_a_log_that_says_why(lines: list[str], told: str) -> None:
    assert telling(lines)[0].startswith(told)


def test_an_empty_log_says_nothing() -> None:
    assert telling([]) == []
