"""limit: what is sent, when the limit is read again, and what is said of it."""

import itertools
import json
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from orchestrator.cli import limit as verb

from .conftest import Ctl
from .running import COMMAND, DEADLINE_S, environment
from .stub_daemon import GIB, MIB, StubDaemon, error, model, pool

AFTER = model(
    overrides={"kv_ceiling": 8 * GIB, "kv_weight": 0.5},
    pool=pool(limit_bytes=8 * GIB, used_bytes=9 * GIB, ceiling_bytes=8 * GIB, status="draining", reason="above its ceiling"),
)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "POLL_S", 0.0)


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["--floor", "2GiB"], {"kv_floor": "2GiB"}),
        (["--ceiling", "0", "--priority", "-2"], {"kv_ceiling": "0", "priority": -2}),
        (["--weight", "0.5", "--priority", "0"], {"kv_weight": 0.5, "priority": 0}),
        (["--floor", "default", "--weight", "Default"], {"kv_floor": None, "kv_weight": None}),
        (["--ceiling", "default", "--priority", "default"], {"kv_ceiling": None, "priority": None}),
        (["--reset"], {"kv_floor": None, "kv_ceiling": None, "kv_weight": None, "priority": None}),
        (["--reset", "--floor", "1GiB"], {"kv_floor": "1GiB", "kv_ceiling": None, "kv_weight": None, "priority": None}),
    ],
)
def test_only_what_was_named_is_sent(daemon: StubDaemon, ctl: Ctl, words: list[str], sent: dict[str, object]) -> None:
    daemon.models = [model("org/qwen")]
    said = ctl("limit", "org/qwen", *words)
    assert said.exit_code == 0, said.stderr
    assert daemon.sent("POST").path == "/api/v1/models/org%2Fqwen/limit"
    assert daemon.sent("POST").body == sent


@pytest.mark.parametrize(
    "words", [["qwen"], [], ["qwen", "--weight", "0"], ["qwen", "--weight", "much"], ["qwen", "--priority", "1.5"], ["qwen", "--floor"]]
)
def test_what_cannot_be_sent_is_a_usage_error(daemon: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    assert ctl("limit", *words).exit_code == 2
    assert daemon.requests == []


def test_nothing_to_change_says_what_to_give(ctl: Ctl) -> None:
    assert "nothing to change: give --floor, --ceiling, --weight, --priority or --reset" in ctl("limit", "qwen").stderr


@pytest.mark.parametrize("looks", [[12, 13, 14], [13, 18], [12, 12, 13, 13, 14]])
def test_the_limit_is_read_after_the_loop_has_looked(daemon: StubDaemon, ctl: Ctl, looks: list[int]) -> None:
    daemon.models, daemon.limited, daemon.looks = [model()], AFTER, iter(looks)
    said = ctl("limit", "q", "--ceiling", "8GiB", "--weight", "0.5")
    assert [" ".join(each.split()) for each in said.stdout.splitlines()] == [
        "Floor 2.0GiB (of the spec)",
        "Ceiling 8.0GiB (set at runtime)",
        "Weight 0.5 (set at runtime)",
        "Priority the daemon's default",
        "Limit 8.0GiB (draining: above its ceiling)",
        "Used 9.0GiB",
    ]
    assert said.stderr == ""


def test_limit_json_is_the_model_after_the_look(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models, daemon.limited = [model()], AFTER
    assert json.loads(ctl("limit", "qwen", "--ceiling", "8GiB", "--json").stdout) == AFTER


def test_an_automatic_bound_is_shown_with_its_size(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [model(spec={"kv_floor": None, "kv_ceiling": None, "kv_weight": 1.0, "priority": 0}, pool=pool(floor_bytes=896 * MIB))]
    words = " ".join(ctl("limit", "qwen", "--reset").stdout.split())
    assert "Floor 896MiB (automatic: one request of 8,192 tokens)" in words
    assert "Ceiling 60.0GiB (automatic: what the card leaves)" in words
    assert "Weight 1.0 (of the spec) Priority 0 (of the spec)" in words


@pytest.mark.parametrize("state", ["stopped", "starting"])
def test_without_a_pool_there_is_nothing_to_wait_for(daemon: StubDaemon, ctl: Ctl, state: str) -> None:
    daemon.models = [model(state=state, spec={}, overrides={"kv_floor": GIB})]
    said = ctl("limit", "qwen", "--floor", "1GiB")
    assert said.exit_code == 0
    assert f"none: qwen is {state}; the bounds hold as soon as it has a KV pool" in said.stdout
    assert "automatic: what the card leaves" in said.stdout
    assert len(daemon.requests) == 1


def test_a_loop_that_does_not_look_is_said(daemon: StubDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "LOOK_S", 0.05)
    daemon.models, daemon.looks = [model()], itertools.repeat(12)
    said = ctl("limit", "qwen", "--floor", "1GiB")
    assert said.exit_code == 0
    assert "the daemon's loop has not looked for 0.05s: this limit may be the old one" in said.stderr
    assert "Limit" in said.stdout


def test_a_daemon_that_was_restarted_counts_anew(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models, daemon.looks = [model()], iter([1000, 1, 2, 3])
    said = ctl("limit", "qwen", "--floor", "1GiB")
    assert (said.exit_code, said.stderr) == (0, "")
    assert list(daemon.looks) == []


def test_bad_values_are_named(daemon: StubDaemon, ctl: Ctl) -> None:
    problems = [{"field": "kv_floor", "message": "'3GB' is ambiguous"}]
    daemon.replies["POST", "/models/qwen/limit"] = error(422, "kv_floor: ...", "invalid_spec", errors=problems)
    said = ctl("limit", "qwen", "--floor", "3GB")
    assert said.exit_code == 78
    assert "  kv_floor: '3GB' is ambiguous\n" in said.stderr


def test_an_unknown_model(daemon: StubDaemon, ctl: Ctl) -> None:
    assert ctl("limit", "none", "--reset").exit_code == 4


def test_ctrl_c_leaves_the_bounds_changed(daemon: StubDaemon, sock: str) -> None:
    asked = threading.Event()

    def silent() -> Iterator[int]:
        asked.set()
        daemon.over.wait()
        yield 12

    daemon.models, daemon.looks = [model()], silent()
    env = environment(ORCH_HOST=sock)
    words = [*COMMAND, "limit", "qwen", "--floor", "1GiB"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert asked.wait(DEADLINE_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (130, "")
    assert err == "the bounds are changed, its limit follows; `orchestratorctl describe qwen` to look\n"


def test_describe_shows_overrides(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.models = [AFTER]
    words = " ".join(ctl("describe", "qwen").stdout.split())
    assert "Overrides kv_ceiling 8.0GiB kv_weight 0.5 back to spec `orchestratorctl limit --reset qwen`" in words
    daemon.models = [model(overrides={})]
    assert "Overrides" not in ctl("describe", "qwen").stdout
