"""add-model, rm, start, stop: what is sent, what is waited for, and what is said at the end."""

import json
from pathlib import Path

import pytest

from orchestrator.cli import wait

from .conftest import Ctl
from .stub_daemon import CUT, HANG, StubDaemon, engine, error, failure, model

SOURCE = "Qwen/Qwen2.5-7B-Instruct"


def test_add_model_sends_what_was_given_and_nothing_else(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model()]
    assert ctl("add-model", "qwen", SOURCE).exit_code == 0
    order = daemon.sent("POST")
    assert order.path == "/api/v1/models?start=true"
    assert order.body == {"name": "qwen", "source": SOURCE}
    assert order.headers["Content-Type"] == "application/json"


def test_add_model_sends_every_option(daemon: StubDaemon, ctl: Ctl) -> None:
    said = ctl(
        "add-model",
        "org/qwen",
        SOURCE,
        "--alias",
        "a",
        "--alias",
        "b",
        "--gpu",
        "1",
        "--gpu",
        "GPU-0a",
        "--tp",
        "2",
        "--engine",
        "old",
        "--env",
        "A=b=c",
        "--env",
        "D=",
        "--kv-floor",
        "2GiB",
        "--kv-ceiling",
        "20GiB",
        "--kv-weight",
        "0.5",
        "--priority",
        "-2",
        "--pinned",
        "--preload",
        "--sleep-timeout",
        "2m",
        "--sleep-level",
        "2",
        "--adapter",
        "sql=/a/sql",
        "--adapter",
        "fr=org/fr",
        "--idle-timeout",
        "10m",
        "--min-residency",
        "1m",
        "--start-timeout",
        "5m",
        "--max-concurrency",
        "8",
        "--max-queue",
        "0",
        "--no-start",
        "--",
        "--max-model-len",
        "4096",
        "--json",
    )
    assert said.exit_code == 0, said.stderr
    assert daemon.sent("POST").path == "/api/v1/models?start=false"
    assert daemon.sent("POST").body == {
        "name": "org/qwen",
        "source": SOURCE,
        "aliases": ["a", "b"],
        "adapters": {"sql": "/a/sql", "fr": "org/fr"},
        "gpus": [1, "GPU-0a"],
        "tensor_parallel_size": 2,
        "engine": "old",
        "env": {"A": "b=c", "D": ""},
        "kv_floor": "2GiB",
        "kv_ceiling": "20GiB",
        "kv_weight": 0.5,
        "priority": -2,
        "pinned": True,
        "preload": True,
        "sleep_timeout": "2m",
        "sleep_level": 2,
        "idle_timeout": "10m",
        "min_residency": "1m",
        "start_timeout": "5m",
        "max_concurrency": 8,
        "max_queue": 0,
        "args": ["--max-model-len", "4096", "--json"],
    }
    assert said.stdout.startswith("org/qwen is registered")  # --json behind the dashes is vLLM's


def test_zero_auto_and_never_are_values(daemon: StubDaemon, ctl: Ctl) -> None:
    never = ("--idle-timeout", "never", "--sleep-timeout", "never")
    ctl("add-model", "m", SOURCE, "--gpu", "auto", "--priority", "0", *never, "--sleep-level", "0", "--no-wait")
    assert daemon.sent("POST").body == {
        "name": "m",
        "source": SOURCE,
        "gpus": "auto",
        "priority": 0,
        "sleep_level": 0,
        "sleep_timeout": None,
        "idle_timeout": None,
    }


@pytest.mark.parametrize(
    ("given", "sent"),
    [("./weights", "{cwd}/weights"), ("../x", "{up}/x"), ("~/w", "{home}/w"), ("/abs/w", "/abs/w"), ("org/w", "org/w")],
)
def test_a_relative_path_means_here(
    daemon: StubDaemon, ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, sent: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ctl("add-model", "m", given, "--no-wait", HOME="/home/me")
    expected = sent.format(cwd=tmp_path, up=tmp_path.parent, home="/home/me")
    assert daemon.sent("POST").body["source"] == expected


@pytest.mark.parametrize(
    "words",
    [
        ["m"],
        ["m", SOURCE, "stray"],
        ["m", SOURCE, "--env", "NOVALUE"],
        ["m", SOURCE, "--gpu", "auto", "--gpu", "0"],
        ["m", SOURCE, "--tp", "0"],
        ["m", SOURCE, "--kv-weight", "nan"],
        ["m", SOURCE, "--sleep-level", "3"],
        ["m", SOURCE, "--timeout", "soon"],
    ],
)
def test_what_cannot_be_sent_is_a_usage_error(daemon: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    assert ctl("add-model", *words).exit_code == 2
    assert daemon.requests == []


def test_an_option_of_vllm_is_shown_its_place(ctl: Ctl) -> None:
    said = ctl("add-model", "m", SOURCE, "--max-model-len", "4096")
    assert said.exit_code == 2
    assert "Options of vLLM go after `--`." in said.stderr


def test_a_start_is_told_phase_by_phase(daemon: StubDaemon, ctl: Ctl) -> None:
    starting = [
        model(state="starting", engine=engine(phase, at)) for at, phase in enumerate(("spawning", "loading weights", "loading weights"))
    ]
    daemon.watches["qwen"] = [
        model(state="stopped"),
        model(state="waiting", reason="needs 17.0GiB, 3.0GiB are free"),
        *starting[:2],
        starting[1],
        "\n",  # a daemon may keep a connection alive with blank lines
        model(),
    ]
    said = ctl("add-model", "qwen", SOURCE)
    assert said.stderr.splitlines() == [
        "qwen: waiting: needs 17.0GiB, 3.0GiB are free",
        "qwen: starting: spawning (1/5)",
        "qwen: starting: loading weights (2/5)",
    ]
    assert said.stdout.startswith("qwen is ready on GPU 0 after ")
    assert said.exit_code == 0


def test_add_model_json_is_the_final_model(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="starting"), model(in_flight=1)]
    assert json.loads(ctl("add-model", "qwen", SOURCE, "--json").stdout) == model(in_flight=1)


@pytest.mark.parametrize(("option", "state"), [("--no-wait", "starts"), ("--no-start", "first request")])
def test_without_waiting_nothing_is_watched(daemon: StubDaemon, ctl: Ctl, option: str, state: str) -> None:
    said = ctl("add-model", "qwen", SOURCE, option)
    assert said.exit_code == 0
    assert state in said.stdout
    assert len(daemon.requests) == 1


@pytest.mark.parametrize("state", ["failed", "backoff"])
def test_a_start_that_fails_says_why_and_what_to_do(daemon: StubDaemon, ctl: Ctl, state: str) -> None:
    daemon.watches["qwen"] = [model(state="starting"), model(state=state, failure=failure())]
    said = ctl("add-model", "qwen", SOURCE)
    assert said.exit_code == 1
    assert said.stdout == ""
    assert "error: qwen failed to start: out of memory" in said.stderr
    assert "  | loading\n  | CUDA OOM\n" in said.stderr
    assert f"qwen stays registered (state {state}, tries again in 8s)" in said.stderr
    assert "`orchestratorctl rm qwen` to remove it" in said.stderr


def test_a_failure_as_json_holds_the_model(daemon: StubDaemon, ctl: Ctl) -> None:
    last = model(state="failed", failure=failure(retry_in_s=None))
    daemon.watches["qwen"] = [model(state="starting"), last]
    said = ctl("--json", "add-model", "qwen", SOURCE)
    assert said.exit_code == 1
    error = json.loads(said.stdout)["error"]
    assert (error["code"], error["model"]) == ("start_failed", last)


def test_a_model_that_sleeps_at_once_was_ready(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="starting"), model(state="asleep")]
    assert ctl("add-model", "qwen", SOURCE).exit_code == 0


@pytest.mark.parametrize(
    ("state", "said_of_it"), [("removed", "was removed while"), ("stopped", "was stopped before it was ready: by hand")]
)
def test_someone_else_ends_the_start(daemon: StubDaemon, ctl: Ctl, state: str, said_of_it: str) -> None:
    daemon.watches["qwen"] = [model(state="starting"), {"name": "qwen", "state": state, "reason": "by hand"}]
    said = ctl("add-model", "qwen", SOURCE)
    assert said.exit_code == 1
    assert said_of_it in said.stderr


def test_start_waits_past_the_failure_it_mends(daemon: StubDaemon, ctl: Ctl) -> None:
    old = model(state="failed", since_s=900.0, failure=failure())
    daemon.models = [old]
    daemon.watches["qwen"] = [old, model(state="starting"), model()]
    said = ctl("start", "qwen")
    assert said.exit_code == 0, said.stderr
    assert daemon.sent("POST").path == "/api/v1/models/qwen/start"


def test_start_gives_up_on_a_failure_that_stays(daemon: StubDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "STALE_S", 0.01)
    old = model(state="failed", since_s=900.0, failure=failure())
    daemon.models = [old]
    daemon.watches["qwen"] = [old, HANG]
    said = ctl("start", "qwen")
    assert said.exit_code == 1
    assert "qwen failed to start: out of memory" in said.stderr


def test_stop_waits_until_the_engine_is_gone(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [
        model(),
        model(state="draining", reason="2 requests run"),
        model(state="stopping"),
        model(state="stopped", held=True),
    ]
    said = ctl("stop", "qwen")
    assert said.exit_code == 0
    assert said.stderr.splitlines() == ["qwen: draining: 2 requests run", "qwen: stopping"]
    assert said.stdout == "qwen is stopped; `orchestratorctl start qwen` starts it again\n"
    assert daemon.sent("POST").path == "/api/v1/models/qwen/stop"


def test_stop_reports_a_model_that_does_not_get_there(daemon: StubDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "STALE_S", 0.01)
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state="failed", failure=failure()), HANG]
    said = ctl("stop", "qwen")
    assert said.exit_code == 1
    assert "qwen failed to stop: out of memory" in said.stderr


def test_rm_waits_until_it_is_gone(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("org/q")]
    daemon.watches["org/q"] = [
        model("org/q", "draining"),
        model("org/q", "stopping"),
        {"name": "org/q", "state": "removed"},
    ]
    said = ctl("rm", "org/q", "--json")
    assert said.exit_code == 0
    assert json.loads(said.stdout) == {"name": "org/q", "state": "removed"}
    assert daemon.sent("DELETE").path == "/api/v1/models/org%2Fq"


def test_rm_of_what_is_gone_before_we_look(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("m", "stopped")]
    daemon.replies["GET", "/models/m/watch"] = error(404, "gone", "model_not_found")
    said = ctl("rm", "m")
    assert (said.exit_code, said.stdout) == (0, "m is removed\n")


@pytest.mark.parametrize("verb", ["rm", "start", "stop"])
def test_no_wait_returns_at_once(daemon: StubDaemon, ctl: Ctl, verb: str) -> None:
    daemon.models = [model()]
    assert ctl(verb, "qwen", "--no-wait").exit_code == 0
    assert len(daemon.requests) == 1
    assert json.loads(ctl(verb, "qwen", "--no-wait", "--json").stdout) == model()


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            ["add-model", "qwen", SOURCE],
            "still starting; `orchestratorctl describe qwen` to look, `orchestratorctl rm qwen` to undo",
        ),
        (
            ["start", "qwen"],
            "still starting; `orchestratorctl describe qwen` to look, `orchestratorctl stop qwen` to undo",
        ),
        (["stop", "qwen"], "still stopping; `orchestratorctl describe qwen` to look"),
        (["rm", "qwen"], "still being removed; `orchestratorctl describe qwen` to look"),
    ],
)
def test_timeout_leaves_the_work_to_the_daemon(daemon: StubDaemon, ctl: Ctl, words: list[str], advice: str) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state="draining"), HANG]
    said = ctl(*words, "--timeout", "0.2")
    assert said.exit_code == 124
    assert advice in said.stderr


def test_a_daemon_that_dies_while_we_watch(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="starting"), CUT]
    said = ctl("add-model", "qwen", SOURCE)
    assert said.exit_code == 69
    assert "closed the connection" in said.stderr


def test_a_watch_that_ends_early_is_no_success(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.watches["qwen"] = [model(state="starting")]
    assert ctl("add-model", "qwen", SOURCE).exit_code == 69
