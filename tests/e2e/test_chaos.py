"""Chaos, a little of it: short seeds with many faults, and that what checks them finds what it is for. `make chaos` runs long."""

import asyncio
import time
from dataclasses import replace

import pytest

from bench.chaos.asking import Ask, Fate
from bench.chaos.book import Book, Entry, Span
from bench.chaos.daemon_faults import RELOADS
from bench.chaos.run import one
from bench.chaos.schedule import FAULTS, drawn

ASK = Ask("m", chat=False, stream=True, prompt_tokens=1, max_tokens=1)


@pytest.mark.parametrize("seed", [34])
def test_a_short_seed_violates_nothing(seed: int) -> None:
    without = set() if RELOADS else {"reload", "bad-reload", "restart-daemon"}
    outcome = asyncio.run(one(seed, 11 / 60, without, 0.8, None))
    assert outcome.violations == []
    assert sum(outcome.faults.values()) >= 5
    assert outcome.fates["answered 200"] >= 10
    assert outcome.healed >= 1


def test_a_seed_draws_the_same_steps_and_one_left_out_moves_no_other() -> None:
    whole = drawn(7, 600.0)
    assert whole == drawn(7, 600.0)
    assert drawn(7, 60.0) == [step for step in whole if step.at_s < 60.0]
    assert drawn(7, 600.0, without=["grab"]) == [step for step in whole if step.fault != "grab"]
    assert drawn(8, 600.0) != whole
    assert {step.fault for step in drawn(7, 3000.0)} == FAULTS.keys()


def book() -> Book:
    found, now = Book(), time.monotonic()
    found.names["m"] = [Span("m", now - 100, now - 90)]
    found.models["m"] = Entry()
    return found


def fate(how: str, by: str = "m", **more: object) -> Fate:
    now = time.monotonic()
    return Fate(ASK, how, now - 1, now, by=frozenset([by] if by else []), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (fate("answered", by="other"), "answered by the wrong model"),
        (fate("hung", by=""), "no answer and no error in time"),
        (fate("wrong"), "not whole"),
        (fate("cut"), "lost without an error"),
        (fate("unreachable", by=""), "lost without an error"),
        (fate("event"), "an error that nothing explains"),
        (fate("refused", by="", status=404, code="model_not_found"), "a refusal that is not true"),
        (fate("refused", by="", status=503, code="model_stopped"), "a refusal that is not true"),
        (fate("refused", by="", status=502, code="engine_error"), "a refusal that is not true"),
        (fate("refused", by="", status=500, code="internal_error"), "a refusal that is not true"),
    ],
    ids=lambda value: value.words if isinstance(value, Fate) else "",
)
def test_each_bad_end_is_found(found: Fate, what: str) -> None:
    judge, now = book().judge, time.monotonic()  # `found` is as old as the collection of these tests
    assert what in (judge(replace(found, began=now - 1, ended=now), down=False) or "")


def test_an_end_with_a_cause_is_none_and_the_wrong_model_has_no_excuse() -> None:
    hurt = book()
    hurt.hurt("m", "kill-core")
    assert hurt.judge(fate("event"), down=False) is None
    assert hurt.judge(fate("refused", by="", status=502, code="engine_error"), down=False) is None
    assert book().judge(fate("unreachable", by=""), down=True) is None
    assert book().judge(fate("answered"), down=False) is None
    assert hurt.judge(fate("answered", by="other"), down=True)


def test_a_registration_that_is_lost_kept_or_changed_is_found() -> None:
    shown = {"owner": "api", "held": False, "overrides": {}}
    assert book().compare({"m": shown}) == []
    assert book().compare({}) == ["m was added, and is not there"]
    assert book().compare({"m": shown, "n": shown}) == ["n was removed, or never added, and is there"]
    assert book().compare({"m": {**shown, "held": True}}) == ["m: held is True, commanded was False"]
    assert book().compare({"m": {**shown, "overrides": {"pinned": True}}}) == ["m: pinned is True, commanded was None"]
