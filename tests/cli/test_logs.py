"""logs of several models: what is asked for, and the model before each line."""

import json

from .conftest import Ctl
from .running import Terminal, environment
from .stub_daemon import CUT, HANG, Json, Request, StubDaemon, error


def line(model: str, text: str, after: str = "") -> Json:
    return {"model": model, "at": 1.0, "line": text, "after": after}


def test_each_line_of_several_has_its_model_before_it(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.merged = [line("a", "one"), "\n", line("longer", "two"), line("a", "three")]
    done = ctl("logs", "a", "longer", "--since", "5m", "-n", "7")
    assert done.stdout.splitlines() == ["a | one", "longer | two", "a      | three"]
    assert daemon.sent("GET").path == "/api/v1/logs?model=a&model=longer&tail=7&follow=0&previous=0&since=300.000000"
    assert json.loads(ctl("logs", "--json").stdout)["lines"][1] == line("longer", "two")


def test_one_model_needs_no_name_before_its_lines(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.merged = [line("a", "one")]
    assert ctl("logs", "a", "--previous").stdout == "one\n"
    assert daemon.sent("GET").path == "/api/v1/logs?model=a&tail=100&follow=0&previous=1"
    assert ctl("logs", "a", "--previous", "-f").exit_code == 2


def test_a_model_without_a_log_is_said(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/logs"] = error(404, "There is no log of 'a': it was started once at most.", "no_log")
    done = ctl("logs", "a", "--previous")
    assert (done.exit_code, "started once at most" in done.stderr) == (3, True)


def test_on_a_terminal_each_model_has_its_colour(daemon: StubDaemon, sock: str) -> None:
    daemon.merged = [line("a", "one"), line("b", "two"), line("a", "three")]
    with Terminal("logs", env=environment(ORCH_HOST=sock)) as shown:
        assert shown.end() == 0
    prefixes = [text.partition(" |")[0] for text in shown.raw.splitlines() if " |" in text]
    assert prefixes[0] == prefixes[2] != prefixes[1]
    assert prefixes[0].startswith("\x1b[")


def test_following_goes_on_after_the_last_line_of_each_when_the_daemon_is_back(daemon: StubDaemon, sock: str) -> None:
    streams = iter(
        [[line("a", "one", "a.log:4"), line("b", "two", "b.log:4"), line("a", "three", "a.log:9"), CUT], [line("a", "four"), HANG]]
    )
    answer = daemon.answer

    def answers(request: Request) -> object:
        return next(streams) if request.path.startswith("/api/v1/logs") else answer(request)

    daemon.answer = answers  # type: ignore[assignment, method-assign]
    with Terminal("logs", "-f", "-n", "5", env=environment(ORCH_HOST=sock)) as shown:
        shown.wait_for("four")
        shown.interrupt()
        assert shown.end() == 130
    assert [text.split("| ")[-1] for text in shown.text.replace("\r", "").splitlines() if text] == [
        "one", "two", "three", "the daemon is away; waiting for it", "the daemon is back", "four",
    ]  # fmt: skip
    asked = [request.path.partition("?")[2] for request in daemon.requests if request.path.startswith("/api/v1/logs")]
    assert asked == [f"tail=5&follow=1&previous=0{more}" for more in ("", "&after=a.log%3A9&after=b.log%3A4")]


def test_a_daemon_that_was_never_there_is_said_at_once(ctl: Ctl) -> None:
    assert ctl("logs", "-f").exit_code == 69
