"""events: what is asked for, how a line looks, and following on through a daemon that goes and comes."""

import json

from .conftest import Ctl
from .running import Terminal, environment
from .stub_daemon import CUT, HANG, Json, Reply, Request, StubDaemon


def event(number: int, model: str = "qwen", kind: str = "ready", reason: str = "") -> Json:
    return {"id": number, "at": 1.8e9, "model": model, "kind": kind, "reason": reason or f"reason {number}"}


def test_a_line_each_and_what_was_asked_for(daemon: StubDaemon, ctl: Ctl) -> None:
    told = [event(1), event(2, "", "reloaded", "two\nlines \x1b[31mred")]
    daemon.replies["GET", "/events"] = Reply(200, {"events": told, "newest": 2})
    done = ctl("events", "--model", "a/b", "--kind", "ready", "--since", "1h30m", TZ="UTC")
    assert done.exit_code == 0
    first, second = done.stdout.splitlines()
    assert first.split() == ["2027-01-15", "08:00:00", "qwen", "ready", "reason", "1"]
    assert second.endswith("-                     reloaded      two lines red")
    assert daemon.sent("GET").path == "/api/v1/events?model=a%2Fb&kind=ready&since=5400.000000&tail=10000"
    assert json.loads(ctl("events", "--json").stdout)["events"] == told


def test_following_goes_on_where_it_was_when_the_daemon_is_back(daemon: StubDaemon, sock: str) -> None:
    streams = iter([[event(8), "\n", CUT], [event(9), HANG]])
    answer = daemon.answer

    def answers(request: Request) -> object:
        if "follow=true" in request.path:
            return next(streams)
        return answer(request)

    daemon.answer = answers  # type: ignore[assignment, method-assign]
    daemon.replies["GET", "/events"] = Reply(200, {"events": [event(7)], "newest": 7})
    with Terminal("events", "-f", "--model", "qwen", env=environment(ORCH_HOST=sock)) as shown:
        shown.wait_for("reason 9")
        shown.interrupt()
        assert shown.end() == 130
    lines = [line for line in shown.text.replace("\r", "").splitlines() if "reason" in line or "daemon" in line]
    assert [line[line.index("reason") :] if "reason" in line else line for line in lines] == [
        "reason 7", "reason 8", "the daemon is away; waiting for it", "the daemon is back", "reason 9",
    ]  # fmt: skip
    follows = [request.path for request in daemon.requests if "follow=true" in request.path]
    assert follows == [f"/api/v1/events?model=qwen&follow=true&after={n}" for n in (7, 8)]


def test_a_daemon_that_was_never_there_is_said_at_once(ctl: Ctl) -> None:
    done = ctl("events", "-f")
    assert done.exit_code == 69
