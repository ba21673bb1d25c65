"""-o on every verb that shows something: the same object as JSON and as YAML, all columns, or names alone."""

import json

import pytest
import yaml

from .conftest import Ctl
from .stub_daemon import Reply, StubDaemon, error, gpu, model, pool, status

LOOKS = (
    ["ls"],
    ["ps"],
    ["describe", "a"],
    ["explain"],
    ["status"],
    ["start", "a", "--no-wait"],
    ["pin", "a"],
    ["pin", "a", "b"],
    ["doctor"],
    ["events"],
    ["logs", "a"],
    ["logs", "a", "b"],
    ["export"],
)


@pytest.fixture
def two(daemon: StubDaemon) -> StubDaemon:
    daemon.models = [
        model("a", pool=pool(reason="others need memory")),
        model("b", "stopped", reason="idle for 1800s", spec={"pinned": True}),
    ]
    daemon.replies["GET", "/status"] = Reply(200, status(gpus=[gpu(0), gpu(1)]))
    daemon.replies["GET", "/doctor"] = Reply(200, {"findings": [{"state": "ok", "about": "NVML", "what": "there", "mend": None}]})
    daemon.replies["GET", "/events"] = Reply(
        200, {"events": [{"id": 7, "at": 1.0, "kind": "ready", "reason": "", "model": "a"}], "newest": 7}
    )
    daemon.replies["GET", "/logs"] = Reply(200, {"model": "b", "at": 1.0, "line": "one", "after": "b.log:4"})
    daemon.replies["GET", "/specs"] = Reply(200, {"models": {"b": {"source": "org/b"}}})
    daemon.logs["a"] = ["one\n"]
    return daemon


@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_json_and_yaml_are_the_same_object(two: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    plain, short, as_yaml = ctl(*words, "-o", "json"), ctl("--json", *words), ctl("-o", "yaml", *words)
    assert plain.stdout == short.stdout
    assert yaml.safe_load(as_yaml.stdout) == json.loads(plain.stdout) != {}
    assert not as_yaml.stdout.startswith("{")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["ls"], ["a", "b"]),
        (["ps"], ["a"]),
        (["describe", "b"], ["b"]),
        (["explain"], ["0"]),
        (["status"], ["0", "1"]),
        (["pin", "a", "b"], ["a", "b"]),
        (["doctor"], ["NVML"]),
        (["events"], ["7"]),
        (["logs", "a"], ["a"]),
        (["logs", "a", "b"], ["b"]),
        (["export"], ["b"]),
    ],
)
def test_names_alone_are_a_line_each(two: StubDaemon, ctl: Ctl, words: list[str], names: list[str]) -> None:
    assert ctl(*words, "-o", "name").stdout.splitlines() == names
    if words in (["ls"], ["ps"]):
        assert ctl(*words, "-q").stdout.splitlines() == names


def test_no_names_are_no_line(daemon: StubDaemon, ctl: Ctl) -> None:
    assert ctl("ls", "-q").stdout == ""


def test_what_stands_after_the_verb_wins(two: StubDaemon, ctl: Ctl) -> None:
    assert ctl("-o", "json", "ls", "-o", "name").stdout == "a\nb\n"


def test_wide_has_more_columns_and_the_reason_last(two: StubDaemon, ctl: Ctl) -> None:
    header, first, second = ctl("ls", "-o", "wide").stdout.splitlines()
    assert header.split()[-9:] == ["WANTED", "HELD", "PINNED", "PRIORITY", "VENV", "PID", "SINCE", "LAST-USED", "REASON"]
    assert second.endswith("idle for 1800s")
    assert second.split()[11] == "yes"  # pinned
    assert first.split()[14] == "4242"
    assert ctl("ps", "-o", "wide").stdout.splitlines()[1].endswith("others need memory")
    assert "GPU-1" in ctl("status", "-o", "wide").stdout
    assert "LAUNCH" in ctl("explain", "-o", "wide").stdout


@pytest.mark.parametrize(
    "words", [["describe", "x", "-o", "yaml"], ["-oyaml", "describe", "x"], ["--output=yaml", "describe", "x", "--no-such"]]
)
def test_errors_have_the_form_that_was_asked_for(daemon: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    said = ctl(*words)
    assert said.exit_code in (2, 4)
    assert yaml.safe_load(said.stdout)["error"]["message"]


def test_a_form_that_there_is_not_is_refused_with_those_there_are(ctl: Ctl) -> None:
    said = ctl("ls", "-o", "xml")
    assert said.exit_code == 2
    for form in ("table", "wide", "json", "yaml", "name"):
        assert form in said.stderr


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(404, {"error": {"message": "no route", "type": "t", "code": "route_not_found"}}), ["doctor"]),
        (error(405, "no such method", "method_not_allowed"), ["doctor"]),
        (Reply(200, {"checks": []}), ["doctor"]),
        (Reply(200, {"findings": [{"state": "ok"}]}), ["doctor"]),
    ],
)
@pytest.mark.parametrize("theirs", ["0.0.1", "99.1.0"])
def test_a_daemon_of_another_version_is_named(daemon: StubDaemon, ctl: Ctl, reply: Reply, words: list[str], theirs: str) -> None:
    daemon.replies["GET", "/doctor"] = reply
    daemon.replies["GET", "/status"] = Reply(200, status(version=theirs))
    said = ctl(*words, "--json")
    assert said.exit_code == 1
    assert f"it is version {theirs}, this orchestratorctl is" in said.stderr
    assert json.loads(said.stdout)["error"]["code"] == "other_version"


def test_what_a_daemon_of_our_version_lacks_is_a_fault_of_ours(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/doctor"] = Reply(200, {"checks": []})
    with pytest.raises(KeyError):
        ctl("doctor")
