"""logs of several models: what is asked for, and the model before each line."""

import json

from .conftest import Ctl
from .running import Terminal, environment
from .stub_daemon import Json, StubDaemon, error


def line(model: str, text: str) -> Json:
    return {"model": model, "at": 1.0, "line": text}


def merged(daemon: StubDaemon, *steps: object) -> None:
    answer = daemon.answer
    daemon.answer = lambda request: steps if request.path.startswith("/api/v1/logs") else answer(request)  # type: ignore[method-assign]


def test_each_line_of_several_has_its_model_before_it(daemon: StubDaemon, ctl: Ctl) -> None:
    merged(daemon, line("a", "one"), "\n", line("longer", "two"), line("a", "three"))
    done = ctl("logs", "a", "longer", "--since", "5m", "-n", "7")
    assert done.stdout.splitlines() == ["a | one", "longer | two", "a      | three"]
    assert daemon.sent("GET").path == "/api/v1/logs?model=a&model=longer&tail=7&follow=0&previous=0&since=300.000000"
    assert json.loads(ctl("logs", "--json").stdout)["lines"][1] == line("longer", "two")


def test_one_model_needs_no_name_before_its_lines(daemon: StubDaemon, ctl: Ctl) -> None:
    merged(daemon, line("a", "one"))
    assert ctl("logs", "a", "--previous").stdout == "one\n"
    assert daemon.sent("GET").path == "/api/v1/logs?model=a&tail=100&follow=0&previous=1"
    assert ctl("logs", "a", "--previous", "-f").exit_code == 2


def test_a_model_without_a_log_is_said(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/logs"] = error(404, "There is no log of 'a': it was started once at most.", "no_log")
    done = ctl("logs", "a", "--previous")
    assert (done.exit_code, "started once at most" in done.stderr) == (4, True)


def test_on_a_terminal_each_model_has_its_colour(daemon: StubDaemon, sock: str) -> None:
    merged(daemon, line("a", "one"), line("b", "two"), line("a", "three"))
    with Terminal("logs", env=environment(ORCH_HOST=sock)) as shown:
        assert shown.end() == 0
    prefixes = [text.partition(" |")[0] for text in shown.raw.splitlines() if " |" in text]
    assert prefixes[0] == prefixes[2] != prefixes[1]
    assert prefixes[0].startswith("\x1b[")
