"""load, unload, sleep, wake, drain, pin, unpin: what is sent, what is waited for, and what is said where several names are given."""

import json

import pytest

from orchestrator.cli import wait

from .conftest import Ctl
from .stub_daemon import CUT, GIB, HANG, Reply, StubDaemon, error, failure, model, pool, status

WAITED = ("load", "unload", "sleep", "wake", "drain")
VERBS = (*WAITED, "pin", "unpin")


def posts(daemon: StubDaemon) -> list[str]:
    return [each.path.removeprefix("/api/v1/models/") for each in daemon.requests if each.method == "POST"]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_one_order_for_each_name(daemon: StubDaemon, ctl: Ctl, verb: str) -> None:
    daemon.models = [model("org/qwen"), model("night", aliases=["n"])]
    said = ctl(verb, "org/qwen", "n", "org/qwen", *(["--no-wait"] if verb in WAITED else []))
    assert (said.exit_code, said.stderr) == (0, "")
    assert posts(daemon) == [f"org%2Fqwen/{verb}", f"n/{verb}"]
    assert len(daemon.requests) == 2
    assert [line.split()[0] for line in said.stdout.splitlines()] == ["org/qwen", "n"]


@pytest.mark.parametrize("verb", VERBS)
def test_one_name_answers_with_its_model_and_several_with_a_list(daemon: StubDaemon, ctl: Ctl, verb: str) -> None:
    daemon.models = [model("a"), model("b")]
    words = ["--json", *(["--no-wait"] if verb in WAITED else [])]
    assert json.loads(ctl(verb, "a", *words).stdout) == daemon.models[0]
    assert json.loads(ctl(verb, "a", "b", *words).stdout) == {"models": daemon.models}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_without_a_name_is_a_usage_error(daemon: StubDaemon, ctl: Ctl, verb: str) -> None:
    assert ctl(verb).exit_code == 2
    assert daemon.requests == []


@pytest.mark.parametrize("verb", ["load", "wake"])
def test_a_wake_is_told_until_it_is_ready(daemon: StubDaemon, ctl: Ctl, verb: str) -> None:
    daemon.models = [model(state="asleep")]
    daemon.watches["qwen"] = [
        model(state="asleep", reason="12.0GiB are missing: night came less than 30s ago", wanted="ready"),
        model(state="waking", reason="asked for", wanted="ready"),
        model(wanted="ready"),
    ]
    said = ctl(verb, "qwen")
    assert said.exit_code == 0
    assert said.stderr.splitlines() == [
        "qwen: asleep: 12.0GiB are missing: night came less than 30s ago",
        "qwen: waking: asked for",
    ]
    assert said.stdout.startswith("qwen is ready on GPU 0 after 0")


@pytest.mark.parametrize(
    ("verb", "states", "told"),
    [
        ("sleep", ["ready", "draining", "asleep"], "qwen is asleep; a request wakes it\n"),
        ("unload", ["ready", "draining", "stopping", "stopped"], "qwen is unloaded; a request loads it again\n"),
        ("unload", ["asleep", "stopping", "stopped"], "qwen is unloaded; a request loads it again\n"),
        ("unload", ["failed"], "qwen has no engine: it has failed, and `orchestratorctl start qwen` tries again\n"),
        ("drain", ["ready", "draining", "stopping", "stopped"], "qwen is drained and unloaded; a request loads it again\n"),
        ("drain", ["draining", "stopping", "waiting"], "qwen was unloaded; requests that came meanwhile start it again\n"),
    ],
)
def test_a_way_down_is_waited_for(daemon: StubDaemon, ctl: Ctl, verb: str, states: list[str], told: str) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state=state) for state in states]
    said = ctl(verb, "qwen")
    assert (said.exit_code, said.stdout) == (0, told)


def test_all_orders_are_sent_before_the_first_is_waited_for(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("b")]
    daemon.watches = {name: [model(name, "draining"), model(name, "asleep")] for name in ("a", "b")}
    said = ctl("sleep", "a", "b")
    assert said.exit_code == 0
    assert [each.method for each in daemon.requests] == ["POST", "POST", "GET", "GET"]
    assert said.stdout.splitlines() == ["a is asleep; a request wakes it", "b is asleep; a request wakes it"]


def test_one_that_is_refused_does_not_hold_up_the_others(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("b")]
    busy = "'a' has 2 requests: it can not sleep now; `orchestratorctl drain a` lets them end first."
    daemon.replies["POST", "/models/a/sleep"] = error(409, busy, "busy")
    daemon.watches["b"] = [model("b", "asleep")]
    said = ctl("sleep", "a", "b")
    assert said.exit_code == 75
    assert said.stdout == "b is asleep; a request wakes it\n"
    assert said.stderr == f"error: {busy}\n"
    refusal = json.loads(ctl("sleep", "a", "b", "--json").stdout)["error"]
    assert (refusal["code"], refusal["models"]) == ("busy", [model("b", "asleep")])


def test_several_failures_are_all_told_and_the_first_decides_the_exit_code(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("c")]
    daemon.watches = {"a": [model("a", "starting"), model("a", "backoff", failure=failure())], "c": [model("c")]}
    said = ctl("load", "none", "a", "c")
    assert said.exit_code == 4
    assert said.stderr.splitlines()[1:] == [
        "error: 2 of 3 failed",
        "  the model 'none' does not exist",
        "  a failed to start: out of memory",
        "  the engine's last log lines:",
        "    | loading",
        "    | CUDA OOM",
        "  a stays registered (state backoff, tries again in 8s): `orchestratorctl logs a` for more, `orchestratorctl rm a` to remove it",
    ]
    assert said.stdout.startswith("c is ready")
    refusal = json.loads(ctl("load", "none", "a", "c", "--json").stdout)["error"]
    assert [each["code"] for each in refusal["failures"]] == ["model_not_found", "start_failed"]
    assert refusal["models"] == [model("c")]


def test_a_daemon_that_is_gone_is_gone_for_all(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("b")]
    daemon.watches = {"a": [model("a", "waking"), CUT], "b": [model("b")]}
    said = ctl("wake", "a", "b")
    assert said.exit_code == 69
    assert [each.path for each in daemon.requests if each.method == "GET"] == ["/api/v1/models/a/watch"]


@pytest.mark.parametrize(
    ("status_", "code", "exit_code"), [(409, "busy", 75), (409, "conflict", 1), (404, "model_not_found", 4), (422, "invalid_spec", 78)]
)
def test_a_refusal_has_its_exit_code(daemon: StubDaemon, ctl: Ctl, status_: int, code: str, exit_code: int) -> None:
    daemon.replies["POST", "/models/m/unload"] = error(status_, "no, because", code)
    said = ctl("unload", "m")
    assert (said.exit_code, said.stdout, said.stderr) == (exit_code, "", "error: no, because\n")


@pytest.mark.parametrize(("verb", "not_so"), [("sleep", "asleep"), ("unload", "unloaded"), ("drain", "unloaded")])
def test_a_request_that_comes_meanwhile_undoes_it(daemon: StubDaemon, ctl: Ctl, verb: str, not_so: str) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(), model(state="draining"), model(reason="wanted again: 1 requests", in_flight=1), HANG]
    said = ctl(verb, "qwen")
    assert said.exit_code == 75
    assert f"error: qwen is ready, not {not_so}: wanted again: 1 requests\n" in said.stderr
    assert "`orchestratorctl drain qwen` lets its requests end" in said.stderr


def test_a_request_that_came_unseen_undoes_it_too(daemon: StubDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "STALE_S", 0.01)
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(reason="used lately"), HANG]
    said = ctl("sleep", "qwen")
    assert said.exit_code == 75
    assert "qwen is ready, not asleep: used lately" in said.stderr


def test_sleep_that_ends_in_a_stop_is_no_success(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state="draining"), model(state="stopping"), model(state="stopped", reason="its spec changed")]
    said = ctl("sleep", "qwen")
    assert said.exit_code == 1
    assert "qwen was stopped before it slept: its spec changed" in said.stderr


def test_an_engine_that_dies_in_the_attempt(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state="draining"), model(state="stopping"), model(state="backoff", failure=failure())]
    said = ctl("sleep", "qwen", "--json")
    assert said.exit_code == 1
    assert json.loads(said.stdout)["error"]["code"] == "sleep_failed"
    assert "qwen failed to sleep: out of memory" in said.stderr


def test_one_of_several_that_went_again_for_another_is_told(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model("a"), model("b")]
    gone = model("b", "asleep", wanted="nothing", reason="makes room for a: idle for 31s")
    daemon.watches = {"a": [model("a", wanted="ready")], "b": [gone, HANG]}
    said = ctl("load", "a", "b")
    assert said.exit_code == 1
    assert "error: b is asleep: makes room for a: idle for 31s\n" in said.stderr


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["sleep", "qwen"], "still going to sleep; `orchestratorctl describe qwen` to look, `orchestratorctl wake qwen` to undo"),
        (["drain", "qwen", "a b"], "still being unloaded; `orchestratorctl ls` to look, `orchestratorctl load qwen 'a b'` to undo"),
    ],
)
def test_timeout_leaves_the_work_to_the_daemon(daemon: StubDaemon, ctl: Ctl, words: list[str], advice: str) -> None:
    daemon.models = [model(), model("a b")]
    daemon.watches["qwen"] = [model(state="draining"), HANG]
    said = ctl(*words, "--timeout", "0.2")
    assert said.exit_code == 124
    assert advice in said.stderr


# ---- what ls, ps, describe and status show of it ----------------------------------------------------------------------

FOOTPRINT = {
    "source": "learned",
    "total_bytes": 17 * GIB,
    "parts": {"learned": 17 * GIB},
    "start_s": 4.1,
    "asleep_bytes": 2 * GIB,
    "host_bytes": 15 * GIB,
    "sleep_s": 0.3,
    "wake_s": 0.33,
}


def test_a_model_that_sleeps_is_listed_with_what_it_keeps(daemon: StubDaemon, ctl: Ctl) -> None:
    asleep = model(state="asleep", pool=pool(limit_bytes=56 << 20, used_bytes=56 << 20))
    daemon.models = [asleep, model("b", "waking"), model("c", "stopped")]
    assert [line.split()[1] for line in ctl("ls").stdout.splitlines()[1:]] == ["asleep", "waking", "stopped"]
    assert [line.split()[:2] for line in ctl("ps").stdout.splitlines()[1:]] == [["qwen", "asleep"], ["b", "waking"]]


def test_describe_shows_why_it_sleeps_and_what_that_costs(daemon: StubDaemon, ctl: Ctl) -> None:
    spec = {"pinned": True, "sleep_timeout": 300.0, "sleep_level": 1, "min_residency": 30.0}
    daemon.models = [model(state="asleep", reason="idle for 300s", since_s=12.0, footprint=FOOTPRINT, spec=spec)]
    words = " ".join(ctl("describe", "qwen").stdout.split())
    for each in (
        "State asleep for 12s Reason idle for 300s",
        "Pinned yes: it does not sleep or stop for being idle, nor for another model",
        "start takes 4.1s asleep 2.0GiB, and 15.0GiB of host memory sleep takes 0.3s wake takes 0.33s",
        "sleep_timeout 5m00s sleep_level 1 min_residency 30s",
    ):
        assert each in words, each


def test_describe_of_one_that_never_sleeps(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model(footprint=FOOTPRINT, spec={"sleep_level": 0, "sleep_timeout": None, "idle_timeout": None})]
    page = ctl("describe", "qwen").stdout
    words = " ".join(page.split())
    assert "sleep_level 0 sleep_timeout never idle_timeout never" in words
    assert "wake takes" not in page
    assert "Pinned" not in page


def test_describe_tells_a_pin_from_bounds(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model(overrides={"pinned": True})]
    page = ctl("describe", "qwen").stdout
    assert "pinned" in page.partition("Overrides")[2].partition("Events")[0]
    assert "limit --reset" not in page  # it gives bounds back to the spec, not a pin


def test_status_shows_host_memory_of_sleepers(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/status"] = Reply(200, status(host={"sleepers_bytes": 15 * GIB, "budget_bytes": 64 * GIB}))
    assert "hold 15.0GiB of host memory; they may hold 64.0GiB" in ctl("status").stdout
    daemon.replies["GET", "/status"] = Reply(200, status())
    assert "Sleepers" not in ctl("status").stdout
