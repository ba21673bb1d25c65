"""apply, diff and export: what is sent, where a fault stands, who is asked, and the exit codes."""

import json
from pathlib import Path

import pytest
import yaml

from .conftest import Ctl
from .running import Terminal, environment
from .stub_daemon import Json, Reply, StubDaemon, error, model

NOTHING: Json = {"added": [], "changed": [], "removed": [], "unchanged": ["b"], "dry_run": False}
CHANGED: Json = {
    "added": [{"name": "new", "spec": {"source": "org/new"}}],
    "changed": [
        {
            "name": "a",
            "fields": {
                "kv_floor": {"before": None, "after": "2GiB"},
                "env": {"before": {"HF_TOKEN": "(hidden)"}, "after": {"HF_TOKEN": "(hidden)"}},
            },
            "new_engine": True,
        }
    ],
    "removed": [{"name": "old", "spec": {"source": "org/old"}}],
    "unchanged": ["b"],
    "dry_run": False,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  a:\n    source: org/a\n    kv_floor: 2GiB\n  b: {source: org/b}\n")
    return path


def answers(daemon: StubDaemon, body: Json) -> None:
    daemon.replies["PUT", "/models"] = Reply(200, body)


def test_apply_sends_all_files_as_one_and_tells_each_change(daemon: StubDaemon, ctl: Ctl, file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("models: {c: {source: org/c}}\n")
    answers(daemon, CHANGED)
    done = ctl("apply", "-f", str(file), "-f", str(tmp_path / "more.yaml"), "--prune", "--yes")
    assert done.exit_code == 0
    assert daemon.sent("PUT").body == {
        "models": {"a": {"source": "org/a", "kv_floor": "2GiB"}, "b": {"source": "org/b"}, "c": {"source": "org/c"}},
        "prune": True,
        "dry_run": False,
    }
    assert done.stdout.splitlines() == ["new: added", "a: changed: kv_floor, env; a new engine", "old: removed", "1 unchanged"]


def test_apply_reads_stdin_and_as_json_says_what_the_daemon_said(daemon: StubDaemon, file: Path, sock: str) -> None:
    from click.testing import CliRunner

    from orchestrator.cli.main import cli

    answers(daemon, NOTHING)
    done = CliRunner().invoke(cli, ["apply", "-f", "-", "--json"], input=file.read_text(), env={"ORCH_HOST": sock})
    assert (done.exit_code, json.loads(done.stdout)) == (0, NOTHING)


def test_a_fault_is_named_with_its_file_and_line(daemon: StubDaemon, ctl: Ctl, file: Path) -> None:
    errors = [{"field": "models.a.kv_floor", "message": "too large"}, {"field": "models.b.source", "message": "not there"}]
    daemon.replies["PUT", "/models"] = error(422, "x", "invalid_spec", errors=errors)
    done = ctl("apply", "-f", str(file), "--json")
    assert done.exit_code == 78
    assert f"{file}:4:5: models.a.kv_floor: too large" in done.stderr
    assert f"{file}:5:7: models.b.source: not there" in done.stderr
    assert json.loads(done.stdout)["error"]["errors"] == errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {a: {source: x}}\nlisten: {port: 1}\n", ":2:1: listen: only `models:` is applied"),
        ("models: [a]\n", ":1:1: models: is a map"),
        ("models:\n  a: {source: x}\n  a: {source: y}\n", ":3:3: models.a: is given twice"),
        ("models: {a\n", "not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anybody_is_asked(daemon: StubDaemon, ctl: Ctl, file: Path, text: str, said: str) -> None:
    file.write_text(text)
    done = ctl("apply", "-f", str(file))
    assert (done.exit_code, daemon.requests) == (78, [])
    assert said in done.stderr


def test_a_file_that_is_missing_and_a_model_that_is_in_two(daemon: StubDaemon, ctl: Ctl, file: Path) -> None:
    assert "there is no such config file; did you mean" in ctl("diff", "-f", str(file.with_name("modles.yaml"))).stderr
    done = ctl("diff", "-f", str(file), "-f", str(file))
    assert (done.exit_code, done.stderr.count("is in an earlier file too")) == (78, 2)


def test_diff_ends_with_1_where_there_is_one(daemon: StubDaemon, ctl: Ctl, file: Path) -> None:
    answers(daemon, {**NOTHING, "dry_run": True})
    done = ctl("diff", "-f", str(file))
    assert (done.exit_code, done.stdout, daemon.sent("PUT").body["dry_run"]) == (0, "", True)
    answers(daemon, {**CHANGED, "dry_run": True})
    done = ctl("diff", "-f", str(file), "--prune")
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "new: is not there",
        "  + source: org/new",
        "a: (its engine would be replaced)",
        "  - kv_floor: null",
        "  + kv_floor: 2GiB",
        '  - env: {"HF_TOKEN": "(hidden)"}',
        '  + env: {"HF_TOKEN": "(hidden)"} (another one)',
        "old: is not in the files",
        "  - source: org/old",
    ]


@pytest.mark.parametrize(("word", "code", "puts"), [("y", 0, [True, False]), ("n", 1, [True])])
def test_on_a_terminal_prune_asks_before_it_removes(
    daemon: StubDaemon, file: Path, sock: str, word: str, code: int, puts: list[bool]
) -> None:
    answers(daemon, CHANGED)
    with Terminal("apply", "-f", str(file), "--prune", env=environment(ORCH_HOST=sock)) as shown:
        shown.wait_for("old: remove it? [y/N]:")
        shown.type(f"{word}\n")
        assert shown.end() == code
    assert [request.body["dry_run"] for request in daemon.requests] == puts


def test_apply_waits_for_those_that_are_to_be_ready(daemon: StubDaemon, ctl: Ctl, file: Path) -> None:
    answers(daemon, CHANGED)
    daemon.models = [model("new", "stopped", wanted="nothing"), model("a", "draining", wanted="ready")]
    daemon.watches = {"old": [model("old", "stopping"), {"name": "old", "state": "removed"}], "a": [model("a", "draining"), model("a")]}
    done = ctl("apply", "-f", str(file), "--prune", "--wait")
    assert done.exit_code == 0
    assert "a is ready" in done.stderr
    assert {path for path in (r.path for r in daemon.requests) if path.endswith("watch")} == {
        "/api/v1/models/old/watch",
        "/api/v1/models/a/watch",
    }


def test_export_writes_yaml(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/specs"] = Reply(200, {"models": {"a": {"source": "org/a", "env": {"A": "1"}}}})
    done = ctl("export", "a", "--secrets")
    assert yaml.safe_load(done.stdout) == {"models": {"a": {"source": "org/a", "env": {"A": "1"}}}}
    assert daemon.sent("GET").path == "/api/v1/specs?name=a&secrets=true"


@pytest.mark.parametrize("words", [["apply"], ["diff"]])
def test_yaml_and_names_are_of_what_changes(daemon: StubDaemon, ctl: Ctl, file: Path, words: list[str]) -> None:
    answers(daemon, CHANGED)
    assert yaml.safe_load(ctl(*words, "-f", str(file), "-o", "yaml").stdout) == CHANGED
    assert ctl(*words, "-f", str(file), "-o", "name").stdout == "new\na\nold\n"
    answers(daemon, NOTHING)
    assert ctl(*words, "-f", str(file), "-o", "name").stdout == ""
