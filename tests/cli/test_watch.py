"""--watch on a terminal and in a pipe, through a daemon that goes and comes back; and how it ends."""

import itertools
import os
import signal
import subprocess
import threading

import pytest

from .running import COMMAND, DEADLINE_S, Terminal, environment
from .stub_daemon import Handler, Reply, StubDaemon, UnixServer, explained, model

FAST = ("--interval", "0.1")
ENTERED, LEFT = "\x1b[?1049h", "\x1b[?1049l"


@pytest.mark.parametrize(
    ("words", "first", "then"),
    [
        (["ls"], "qwen", "llama"),
        (["ps", "-w"], "qwen", "llama"),
        (["status"], "12 ticks", "900 ticks"),
        (["explain"], "qwen", "do NOT add up"),
        (["explain", "qwen"], "qwen", "do NOT add up"),
        (["top"], "qwen", "llama"),
    ],
)
def test_a_terminal_is_redrawn_and_given_back(daemon: StubDaemon, sock: str, words: list[str], first: str, then: str) -> None:
    daemon.models = [model("qwen")]
    daemon.looks = itertools.repeat(12)
    daemon.replies["GET", "/events"] = Reply(200, {"events": []})
    with Terminal(*words, *FAST, env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for(first)
        daemon.models = [model("qwen"), model("llama", "draining")]
        daemon.gpus = [explained(total_bytes=1)]
        daemon.looks = itertools.repeat(900)
        terminal.wait_for(then)
        terminal.interrupt()
        assert terminal.end() == 130
    assert terminal.raw.index(ENTERED) < terminal.raw.index(LEFT)
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")
    assert "Traceback" not in terminal.text


def test_q_ends_it_in_order(daemon: StubDaemon, sock: str) -> None:
    daemon.models = [model()]
    with Terminal("ls", "-w", env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for("qwen")
        terminal.type("q")
        assert terminal.end() == 0
    assert LEFT in terminal.raw


def test_a_terminated_watch_gives_the_terminal_back(daemon: StubDaemon, sock: str) -> None:
    with Terminal("status", "-w", env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for("orchestratord")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 143
    assert LEFT in terminal.raw


def test_a_terminal_is_told_that_the_daemon_is_away_and_sees_it_come_back(daemon: StubDaemon, sock: str) -> None:
    daemon.models = [model("before")]
    with Terminal("ls", *FAST, env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for("before")
        daemon.close()
        terminal.wait_for("waiting for the daemon: no daemon at")
        os.unlink(sock)
        again = StubDaemon(UnixServer(sock, Handler))
        again.models = [model("after")]
        terminal.wait_for("after")
        terminal.interrupt()
        assert terminal.end() == 130
        again.close()


def test_a_pipe_gets_a_block_for_each_change_and_nothing_between(daemon: StubDaemon, sock: str) -> None:
    enough = threading.Event()
    asked = 0
    answer = daemon.answer

    def counted(request: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 3:
            daemon.models = [model("qwen", "draining", idle_s=9.0)]
        if asked > 6:
            enough.set()
        return answer(request)  # type: ignore[arg-type]

    daemon.models = [model("qwen", idle_s=1.0)]
    daemon.answer = counted  # type: ignore[assignment, method-assign]
    command = [*COMMAND, "ls", *FAST]
    with subprocess.Popen(command, env=environment(ORCH_HOST=sock), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert enough.wait(DEADLINE_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (130, "")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("qwen")] == ["ready", "draining"]
    assert "\x1b" not in out


def test_no_daemon_at_the_first_look_is_an_error(sock: str) -> None:
    done = subprocess.run([*COMMAND, "ls", "-w"], env=environment(ORCH_HOST=sock), capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 69
