"""What follows a failure: a table of tries and delays, and the last words that end the trying."""

import pytest

from orchestrator.policy.restart import FINAL, FIRST_DELAY_S, LONGEST_DELAY_S, MAX_FAILURES, GiveUp, Retry, after_failure

OOM = ("INFO loading", "torch.OutOfMemoryError: CUDA out of memory", "")


@pytest.mark.parametrize(("failures", "delay"), [(1, 2.0), (2, 4.0), (3, 8.0), (4, 16.0)])
@pytest.mark.parametrize("was_ready", [False, True])
def test_it_is_tried_again_later_each_time(failures: int, delay: float, was_ready: bool) -> None:
    answer = after_failure(failures, 100.0, OOM, was_ready)
    assert answer == Retry(100.0 + delay, f"attempt {failures + 1} of {MAX_FAILURES} in {delay:.0f}s")


@pytest.mark.parametrize("failures", [MAX_FAILURES, MAX_FAILURES + 1, 1000])
@pytest.mark.parametrize("was_ready", [False, True])
def test_it_is_given_up_after_so_many_in_a_row(failures: int, was_ready: bool) -> None:
    answer = after_failure(failures, 100.0, (), was_ready)
    assert answer == GiveUp(f"failed {failures} times in a row: mend the cause, then start it by hand")


@pytest.mark.parametrize("words", FINAL)
def test_a_mistake_in_the_spec_is_final_at_its_first_start(words: str) -> None:
    log = ("INFO loading", f"  error here: {words} foo \n", "INFO exiting")
    assert after_failure(1, 0.0, log, was_ready=False) == GiveUp(f"no retry can mend this: error here: {words} foo")


@pytest.mark.parametrize("words", FINAL)
def test_nothing_is_final_once_it_was_ready(words: str) -> None:
    assert isinstance(after_failure(1, 0.0, (words,), was_ready=True), Retry)


def test_the_last_of_several_final_words_is_shown_and_a_long_line_is_cut() -> None:
    answer = after_failure(1, 0.0, ("ModuleNotFoundError: x", "does not exist " + "y" * 1000), was_ready=False)
    assert isinstance(answer, GiveUp)
    assert answer.reason.startswith("no retry can mend this: does not exist yyy")
    assert len(answer.reason) < 350


def test_no_delay_is_longer_than_the_longest() -> None:
    delays = [answer.at for n in range(1, MAX_FAILURES) if isinstance(answer := after_failure(n, 0.0, (), True), Retry)]
    assert delays[0] == FIRST_DELAY_S
    assert delays == sorted(delays)
    assert max(delays) <= LONGEST_DELAY_S
