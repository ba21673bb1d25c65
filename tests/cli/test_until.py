"""wait: reached, out of reach, too late; and a daemon that is away meanwhile."""

from collections.abc import Iterator

import pytest

from orchestrator.cli.until import STATES, judge

from .conftest import Ctl
from .stub_daemon import CUT, HANG, StubDaemon, failure, model


@pytest.mark.parametrize("goal", STATES)
def test_it_waits_until_the_state_is_there(daemon: StubDaemon, ctl: Ctl, goal: str) -> None:
    state = "removed" if goal == "deleted" else goal
    daemon.watches["qwen"] = [model(state="stopped"), model(state="starting"), model(state="ready"), model(state=state, reason="why"), HANG]
    said = ctl("wait", "qwen", f"--for={goal}")
    assert (said.exit_code, said.stdout) == (0, f"qwen is {goal}\n")


def test_what_an_operators_word_alone_could_end_is_the_end() -> None:
    for goal in STATES:
        assert judge(model(state="failed"), goal) == {"failed": "reached", "deleted": "go on"}.get(goal, "failed")
        assert judge({"state": "removed"}, goal) == ("reached" if goal == "deleted" else "failed")
        assert judge(model(state="backoff"), goal) == ("reached" if goal == "backoff" else "go on")


def test_a_model_that_failed_will_not_be_ready(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="starting"), model(state="failed", failure=failure()), HANG]
    said = ctl("wait", "qwen")
    assert said.exit_code == 1
    assert "qwen is failed and does not become ready by itself: out of memory" in said.stderr
    assert "| CUDA OOM" in said.stderr
    assert "`orchestratorctl start qwen` tries it again" in said.stderr


def test_timeout_is_124(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="asleep"), HANG]
    said = ctl("wait", "qwen", "--timeout", "0.2")
    assert said.exit_code == 124
    assert "qwen is not ready yet" in said.stderr


def test_timeout_is_for_all_together_and_names_the_late_one(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches = {"a": [model("a", "failed")], "b": [model("b", "asleep"), HANG], "c": [model("c")]}
    said = ctl("wait", "a", "b", "c", "--timeout", "0.2")
    assert said.exit_code == 124
    assert "b is not ready yet" in said.stderr
    assert "a is failed" in said.stderr


def test_nobody_is_waited_for_who_does_not_exist(daemon: StubDaemon, ctl: Ctl) -> None:
    assert ctl("wait", "nobody").exit_code == 4
    assert ctl("wait", "nobody", "--for", "deleted").exit_code == 0


def test_one_that_cannot_come_does_not_hide_the_others(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches = {"a": [model("a", "failed")], "b": [model("b")]}
    said = ctl("wait", "a", "b")
    assert (said.exit_code, said.stdout) == (1, "b is ready\n")


def test_a_daemon_that_restarts_is_waited_for(daemon: StubDaemon, ctl: Ctl) -> None:
    streams: Iterator[list[object]] = iter([[model(state="starting"), CUT], [model()]])
    answer = daemon.answer
    daemon.answer = lambda request: next(streams) if request.path.endswith("/watch") else answer(request)  # type: ignore[method-assign]
    said = ctl("wait", "qwen")
    assert (said.exit_code, said.stdout) == (0, "qwen is ready\n")
    assert "waiting for the daemon" in said.stderr
