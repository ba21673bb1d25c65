"""Help that teaches, a start that stays light, completion that never prints."""

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from orchestrator import __version__
from orchestrator.cli.exits import MEANINGS
from orchestrator.cli.main import cli

from .conftest import Ctl
from .running import DEADLINE_S, environment, run
from .stub_daemon import StubDaemon, model

RESIDENCY = ("load", "unload", "sleep", "wake", "drain", "pin", "unpin", "plan")
LOOKS = ("ls", "ps", "describe", "explain", "logs", "status", "top", "wait", "events", "doctor", "bench")
WISHES = ("limit", "apply", "diff", "export", "adapt")
VERBS = ("add-model", "rm", "start", "stop", "pull", *RESIDENCY, *WISHES, *LOOKS, "keys", "reload", "restart-daemon", "completion")


def test_the_verbs() -> None:
    assert tuple(cli.commands) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches(ctl: Ctl, verb: str) -> None:
    said = ctl(verb, "--help")
    assert said.exit_code == 0
    examples = [line for line in said.stdout.partition("Examples")[2].splitlines() if line.startswith("    orchestratorctl")]
    assert examples
    for option in ("--json", "--output", "--host", "--admin-key"):
        assert option in said.stdout


@pytest.mark.parametrize("verb", ["unload", "sleep", "drain"])
def test_the_ways_down_are_told_apart_where_one_is_chosen(ctl: Ctl, verb: str) -> None:
    ways = ctl(verb, "--help").stdout.partition("Which way down:")[2].splitlines()
    assert [line.split()[0] for line in ways if line.strip()] == ["sleep", "unload", "drain", "stop"]


@pytest.mark.parametrize("verb", VERBS)
def test_each_option_says_what_it_does(verb: str) -> None:
    for param in cli.commands[verb].params:
        if isinstance(param, click.Option):
            assert param.help, param.name


def test_the_list_of_verbs_is_not_cut_short(ctl: Ctl) -> None:
    assert "..." not in ctl("--help").stdout.partition("Commands:")[2].partition("Exit codes")[0]


def test_the_epilog_lists_the_exit_codes(ctl: Ctl) -> None:
    listed = ctl("--help").stdout.partition("Exit codes:")[2].split("\n")
    assert [int(line.split()[0]) for line in listed if line.strip()] == list(MEANINGS)


def test_version(ctl: Ctl) -> None:
    assert ctl("--version").stdout == f"orchestratorctl {__version__}\n"


HEAVY = (
    "rich",
    "asyncio",
    "httpx2",
    "aiohttp",
    "pydantic",
    "fastapi",
    "importlib.metadata",
    "orchestrator.policy",
    "http.client",
    "ssl",
    "yaml",
    "subprocess",
)


@pytest.mark.parametrize(
    ("words", "heavy"), [(["ls"], (*HEAVY, "orchestrator.cli.change", "orchestrator.cli.top")), (["--help"], (*HEAVY, "socket"))]
)
def test_what_is_slow_to_import_stays_out(daemon: StubDaemon, sock: str, words: list[str], heavy: tuple[str, ...]) -> None:
    """Imports decide the time to start: rich is 60 ms, http.client 25, pydantic 120 and more, and so are the other verbs."""
    code = f"""
import sys
from orchestrator.cli.main import cli
try:
    cli.main({words!r}, prog_name="orchestratorctl")
finally:
    print(*(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(ORCH_HOST=sock),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "\n")


def complete(words: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(cli, {}, "orchestratorctl", "_ORCHESTRATORCTL_COMPLETE")
    return [item.value for item in shell.get_completions(words, incomplete)]


def test_completion_of_verbs() -> None:
    assert complete([], "st") == ["start", "stop", "status"]


def test_completion_of_names(daemon: StubDaemon, sock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_HOST", sock)
    daemon.models = [model("qwen"), model("llama"), model("quiet")]
    assert complete(["describe"], "q") == ["qwen", "quiet"]
    assert complete(["sleep", "llama"], "q") == ["qwen", "quiet"]


def test_completion_without_a_daemon_is_silent(sock: str) -> None:
    done = run(
        env=environment(
            ORCH_HOST=sock,
            _ORCHESTRATORCTL_COMPLETE="bash_complete",
            COMP_WORDS="orchestratorctl stop ",
            COMP_CWORD="2",
        )
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
