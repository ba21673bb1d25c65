"""keys: what is sent, what goes to stdout, what lists show, and that a key is printed alone."""

import json
import time

import pytest
from click.shell_completion import ShellComplete

from orchestrator.cli.main import cli

from .conftest import Ctl
from .stub_daemon import Json, Reply, StubDaemon, error

NOTHING = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}


def key(name: str = "ci", **more: object) -> Json:
    return {
        "name": name, "models": ["qwen", "org/b"], "priority": -1, "weight": 0.5, "rpm": 60, "tpm": None, "concurrency": 4,
        "monthly_tokens": 10**6, "prefix": "sk-orch-abcd", "state": "active", "running": 0, "created_at": 1.0, "last_used_at": None,
        "expires_at": None, "revoked_at": None, "today": NOTHING, "month": NOTHING, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ([], {}),
        (["--model", "a", "-m", "b"], {"models": ["a", "b"]}),
        (["--priority", "-3", "--weight", "2.5"], {"priority": -3, "weight": 2.5}),
        (["--rpm", "1", "--tpm", "2", "--concurrency", "3", "--monthly-tokens", "4"], dict(rpm=1, tpm=2, concurrency=3, monthly_tokens=4)),
        (["--expires", "30d"], {"expires": "30d"}),
        (["--rpm", "0"], {"rpm": 0}),  # that it cannot be is the daemon's to say
    ],
)
def test_only_what_was_named_is_sent_and_the_key_stands_alone_on_stdout(
    daemon: StubDaemon, ctl: Ctl, words: list[str], sent: dict[str, object]
) -> None:
    daemon.replies["POST", "/keys"] = Reply(201, key(key="sk-orch-secret"))
    said = ctl("keys", "create", "ci", *words)
    assert said.exit_code == 0, said.stderr
    assert daemon.sent("POST").path == "/api/v1/keys"
    assert daemon.sent("POST").body == {"name": "ci", **sent}
    assert said.stdout == "sk-orch-secret\n"
    assert "only now" in said.stderr
    assert "sk-orch-secret" not in said.stderr
    assert json.loads(ctl("keys", "create", "ci", "--json").stdout)["key"] == "sk-orch-secret"


@pytest.mark.parametrize("words", [[], ["ci", "--rpm", "many"], ["ci", "--weight", "0"], ["ci", "--priority", "1.5"], ["ci", "x"]])
def test_what_cannot_be_sent_is_exit_2(daemon: StubDaemon, ctl: Ctl, words: list[str]) -> None:
    assert ctl("keys", "create", *words).exit_code == 2
    assert daemon.requests == []


def test_what_the_daemon_refuses_is_said_by_field(daemon: StubDaemon, ctl: Ctl) -> None:
    problems = [{"field": "rpm", "message": "0: input should be greater than or equal to 1"}, {"field": "models", "message": "no 'x'"}]
    daemon.replies["POST", "/keys"] = error(422, "wrong", "invalid_spec", errors=problems)
    said = ctl("keys", "create", "ci", "--rpm", "0")
    assert said.exit_code == 78
    assert said.stdout == ""
    for line in ("  rpm: 0: input should be greater than or equal to 1", "  models: no 'x'"):
        assert line in said.stderr.splitlines()


def test_ls_shows_one_line_a_key_without_blanks_in_cells(daemon: StubDaemon, ctl: Ctl) -> None:
    now = time.time()
    used = {"requests": 3, "prompt_tokens": 40, "completion_tokens": 2}
    daemon.replies["GET", "/keys"] = Reply(
        200,
        {
            "keys": [
                key(last_used_at=now - 90, expires_at=now + 100_000, today=used),
                key("free", models=None, priority=0, weight=1.0, rpm=None, concurrency=None, monthly_tokens=None, state="revoked"),
            ]
        },
    )
    said = ctl("keys", "ls")
    header, one, two = (line.split() for line in said.stdout.splitlines())
    assert header == ["NAME", "STATE", "KEY", "MODELS", "PRIORITY", "WEIGHT", "LIMITS", "LAST-USED", "TODAY", "MONTH", "EXPIRES"]
    limits = "rpm=60,concurrency=4,monthly=1000000"
    assert one[:7] == ["ci", "active", "sk-orch-abcd…", "qwen,org/b", "-1", "0.5", limits]
    assert one[7].startswith("1m3")
    assert one[8:10] == ["3/42", "0/0"]
    assert one[10].startswith("27h")
    assert two == ["free", "revoked", "sk-orch-abcd…", "all", "0", "1", "-", "-", "0/0", "0/0", "-"]
    assert json.loads(ctl("keys", "ls", "--json").stdout)["keys"][1]["name"] == "free"
    assert json.loads(ctl("keys", "--json", "ls").stdout) == json.loads(ctl("--json", "keys", "ls").stdout)


def test_revoke(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["DELETE", "/keys/a@b"] = Reply(200, key("a@b", state="revoked", running=2))
    daemon.replies["DELETE", "/keys/a%40b"] = daemon.replies["DELETE", "/keys/a@b"]
    said = ctl("keys", "revoke", "a@b")
    assert (said.exit_code, said.stdout) == (0, "a@b is revoked; requests of it that still run: 2\n")
    daemon.replies["DELETE", "/keys/x"] = error(404, "name: there is no key 'x'.", "key_not_found")
    said = ctl("keys", "revoke", "x", "--json")
    assert said.exit_code == 4
    assert json.loads(said.stdout)["error"]["code"] == "key_not_found"


def test_usage(daemon: StubDaemon, ctl: Ctl) -> None:
    rows = [{"key": "ci", "model": "qwen", "requests": 7, "prompt_tokens": 70, "completion_tokens": 14}]
    daemon.replies["GET", "/keys/usage"] = Reply(200, {"since": None, "usage": rows})
    said = ctl("keys", "usage")
    assert [line.split() for line in said.stdout.splitlines()] == [
        ["KEY", "MODEL", "REQUESTS", "PROMPT-TOKENS", "COMPLETION-TOKENS"],
        ["ci", "qwen", "7", "70", "14"],
    ]
    assert json.loads(ctl("keys", "usage", "a&b", "--since", "2027-01-01", "--json").stdout)["usage"] == rows
    assert [request.path for request in daemon.requests] == ["/api/v1/keys/usage", "/api/v1/keys/usage?name=a%26b&since=2027-01-01"]


def test_a_refusal_on_the_socket_does_not_speak_of_the_admin_key(daemon: StubDaemon, ctl: Ctl) -> None:
    daemon.replies["GET", "/keys"] = error(403, "The admin socket is for root and the group 'x'.", "not_permitted")
    said = ctl("keys", "ls")
    assert said.exit_code == 5
    assert "the group 'x'" in said.stderr
    assert "admin key" not in said.stderr


@pytest.mark.parametrize("verb", ["create", "ls", "revoke", "usage"])
def test_each_of_them_teaches(ctl: Ctl, verb: str) -> None:
    said = ctl("keys", verb, "--help")
    assert said.exit_code == 0
    assert "orchestratorctl keys" in said.stdout.partition("Examples:")[2]
    for option in ("--json", "--host", "--admin-key"):
        assert option in said.stdout


def test_names_of_keys_are_completed(daemon: StubDaemon, sock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_HOST", sock)
    daemon.replies["GET", "/keys"] = Reply(200, {"keys": [key("ci"), key("alice"), key("carol")]})
    shell = ShellComplete(cli, {}, "orchestratorctl", "_ORCHESTRATORCTL_COMPLETE")
    assert [item.value for item in shell.get_completions(["keys", "revoke"], "c")] == ["ci", "carol"]
