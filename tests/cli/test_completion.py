"""completion: the shells themselves complete, with the script as it is printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .running import DEADLINE_S, ROOT, environment, run
from .stub_daemon import StubDaemon, gpu, model, status

BASH = """
source <(orchestratorctl completion bash)
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDS=() COMPREPLY=()
_orchestratorctl_completion orchestratorctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with this checkout's orchestratorctl."""
    program = tmp_path / "orchestratorctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -W error -m orchestrator.cli "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def shell(words: list[str], path: str, sock: str) -> list[str]:
    env = environment(ORCH_HOST=sock, PYTHONPATH=ROOT) | {"PATH": path}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("orchestratorctl st", ["start", "stop", "status"]),
        ("orchestratorctl describe ", ["org/qwen", "org/qwen:7b"]),
        ("orchestratorctl describe org/qwen:", ["7b"]),  # bash has the rest already
        ("orchestratorctl ls -o ya", ["yaml"]),
        ("orchestratorctl ls --output=ya", ["yaml"]),
        ("orchestratorctl explain ", ["0", "1", "org/qwen", "org/qwen:7b"]),
        ("orchestratorctl wait org/qwen --for st", ["stopped", "starting", "stopping"]),
        ("orchestratorctl completion z", ["zsh"]),
        ("orchestratorctl add-model a b --gpu ", ["0", "1"]),
    ],
)
def test_bash_completes(daemon: StubDaemon, sock: str, path: str, line: str, offered: list[str]) -> None:
    from .stub_daemon import Reply

    daemon.models = [model("org/qwen"), model("org/qwen:7b")]
    daemon.replies["GET", "/status"] = Reply(200, status(gpus=[gpu(0), gpu(1)]))
    assert shell(["bash", "--norc", "-c", BASH, "bash", line], path, sock) == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not here")
def test_fish_completes(daemon: StubDaemon, sock: str, path: str) -> None:
    daemon.models = [model("org/qwen"), model("org/qwen:7b")]
    script = "orchestratorctl completion fish | source; complete -C 'orchestratorctl describe org/'"
    assert shell(["fish", "--no-config", "-c", script], path, sock) == ["org/qwen", "org/qwen:7b"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not here")
def test_zsh_takes_the_script(sock: str, path: str) -> None:
    script = "autoload -Uz compinit; compinit -u -D; source <(orchestratorctl completion zsh); print $_comps[orchestratorctl]"
    assert shell(["zsh", "-f", "-c", script], path, sock) == ["_orchestratorctl_completion"]


def test_a_shell_that_there_is_not_is_refused(sock: str) -> None:
    assert run("completion", "csh", env=environment(ORCH_HOST=sock)).returncode == 2
