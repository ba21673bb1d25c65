"""plan load: a table of steps, what it needs, and a verdict that a script can read from the exit code."""

import json
from typing import Any

import pytest

from .conftest import Ctl
from .stub_daemon import GIB, Reply, StubDaemon

NEED = {"weights": 14 * GIB, "context": GIB, "KV floor": GIB}
STEPS = [
    {"what": "limit", "model": "small", "bytes": 4 * GIB, "seconds": None, "why": "its share of what is left"},
    {"what": "sleep", "model": "night", "bytes": 15 * GIB, "seconds": 0.3, "why": "makes room for qwen: idle for 312s"},
    {"what": "start", "model": "qwen", "bytes": -16 * GIB, "seconds": 4.06, "why": "it needs 16.0GiB on each of its GPUs"},
]


def planned(fits: str, **more: Any) -> Reply:
    found = {"model": "qwen", "fits": fits, "why": "asked for", "need_bytes": 16 * GIB, "need": NEED, "steps": [], "seconds": None}
    return Reply(200, {**found, "retry_in_s": None, **more})


def test_the_steps_are_a_table_and_the_last_line_says_when(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/models/qwen/plan"] = planned("after", steps=STEPS, seconds=4.36)
    said = ctl("plan", "load", "qwen")
    assert (said.exit_code, said.stderr) == (0, "")
    assert [" ".join(line.split()) for line in said.stdout.splitlines()] == [
        "STEP MODEL BYTES SECONDS WHY",
        "limit small +4.0GiB - its share of what is left",
        "sleep night +15.0GiB 0.3s makes room for qwen: idle for 312s",
        "start qwen -16.0GiB 4.1s it needs 16.0GiB on each of its GPUs",
        "",
        "qwen needs 16.0GiB on each of its GPUs: weights 14.0GiB + context 1.0GiB + KV floor 1.0GiB",
        "4.4s until ready",
    ]
    assert [each.method for each in daemon.requests] == ["GET"]  # nothing is done


@pytest.mark.parametrize(
    ("reply", "exit_code", "last"),
    [
        (planned("now", steps=STEPS[-1:], seconds=0.5), 0, "0.5s until ready"),
        (planned("ready", why="it is starting", need={}), 0, "nothing to do: it is starting"),
        (planned("later", why="3.0GiB are missing: b is pinned"), 75, "not now: 3.0GiB are missing: b is pinned"),
        (planned("later", why="b came less than 30s ago", retry_in_s=12.3), 75, "not now: b came less than 30s ago; again in 12s"),
    ],
)
def test_the_exit_code_says_whether_it_fits(daemon: StubDaemon, ctl: Ctl, reply: Reply, exit_code: int, last: str) -> None:
    daemon.replies["GET", "/models/qwen/plan"] = reply
    said = ctl("plan", "load", "qwen")
    assert (said.exit_code, said.stderr) == (exit_code, "")
    assert said.stdout.splitlines()[-1] == last
    as_json = ctl("plan", "load", "qwen", "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)) == (exit_code, reply.body)


def test_one_that_stop_holds_down_is_said_to_be(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/models/qwen/plan"] = planned("now", steps=STEPS[-1:], seconds=0.5, held=True)
    said = ctl("plan", "load", "qwen")
    assert (said.exit_code, said.stderr) == (75, "")
    assert said.stdout.splitlines()[-2:] == [
        "an operator stopped it: `load` is refused; `orchestratorctl start qwen` does this",
        "0.5s until ready",
    ]


@pytest.mark.parametrize("words", [[], ["load"], ["unload", "qwen"], ["load", "a", "b"]])
def test_what_cannot_be_planned_is_a_usage_error(daemon: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    assert ctl("plan", *words).exit_code == 2
    assert daemon.requests == []


def test_an_unknown_model(daemon: StubDaemon, ctl: Ctl) -> None:
    said = ctl("plan", "load", "org/none")
    assert (said.exit_code, said.stdout) == (4, "")
    assert daemon.sent("GET").path == "/api/v1/models/org%2Fnone/plan"
