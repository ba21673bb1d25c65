"""The CLI as a process: terminals, pipes, signals, colours. Exit codes as a shell sees them."""

import os
import signal
import subprocess

import pytest

from .running import COMMAND, DEADLINE_S, Terminal, environment, run
from .stub_daemon import HANG, Reply, StubDaemon, engine, failure, model

SOURCE = "org/model"
STARTING = model(state="starting", engine=engine("loading weights", 1))


def test_a_bar_is_drawn_on_a_terminal(daemon: StubDaemon, sock: str) -> None:
    reason = "needs 17.0GiB on GPU 0 [of 140.0GiB], 3.0GiB are free; waits for night to be idle, then takes its memory"
    daemon.watches["qwen"] = [model(state="waiting", reason=reason), STARTING, model()]
    with Terminal("add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock)) as terminal:
        assert terminal.end() == 0
    assert reason in " ".join(terminal.text.split())
    assert "qwen is ready on GPU 0 after" in terminal.text
    assert "\x1b[?25l" in terminal.raw  # a live bar hides the cursor
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")


def test_a_wake_that_waits_says_what_for(daemon: StubDaemon, sock: str) -> None:
    reason = "12.0GiB are missing: night came less than 30s ago"
    daemon.models = [model(state="asleep")]
    daemon.watches["qwen"] = [model(state="asleep", reason=reason, wanted="ready"), model(state="waking", wanted="ready"), model()]
    with Terminal("wake", "qwen", env=environment(ORCH_HOST=sock)) as terminal:
        assert terminal.end() == 0
    assert f"asleep: {reason}" in " ".join(terminal.text.split())
    assert "qwen is ready on GPU 0 after" in terminal.text


def test_the_bar_shows_the_phase(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, HANG]
    with Terminal("add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for("loading weights (2/5)")
        terminal.wait_for("of about 41s")


def test_ctrl_c_detaches_from_a_terminal(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, HANG]
    with Terminal("add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock)) as terminal:
        terminal.wait_for("loading weights")
        terminal.interrupt()
        assert terminal.end() == 130
    assert "still starting; `orchestratorctl describe qwen` to look, `orchestratorctl rm qwen` to undo" in terminal.text
    assert "Traceback" not in terminal.text
    assert terminal.raw.rindex("\x1b[?25h") > terminal.raw.rindex("\x1b[?25l")
    assert [each.method for each in daemon.requests] == ["POST", "GET"]  # nothing was cancelled


def test_ctrl_c_detaches_from_a_pipe(daemon: StubDaemon, sock: str) -> None:
    daemon.models = [model()]
    daemon.watches["qwen"] = [model(state="draining", reason="2 requests run"), HANG]
    env = environment(ORCH_HOST=sock)
    with subprocess.Popen([*COMMAND, "rm", "qwen"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "qwen: draining: 2 requests run\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (130, "")
    assert err == "still being removed; `orchestratorctl describe qwen` to look\n"


def test_ctrl_c_ends_a_followed_log(daemon: StubDaemon, sock: str) -> None:
    daemon.merged = [{"model": "qwen", "at": None, "line": "hello", "after": "x.log:6"}, HANG]
    env = environment(ORCH_HOST=sock)
    with subprocess.Popen([*COMMAND, "logs", "-f", "qwen"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hello\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["logs", "m"], ["--help"], ["describe", "none", "--json"]])
def test_a_reader_that_left_is_no_traceback(daemon: StubDaemon, sock: str, words: list[str]) -> None:
    daemon.models = [model(f"m{number}") for number in range(50)]
    daemon.logs["m"] = ["a line\n"] * 100
    ours, theirs = os.pipe()
    os.close(ours)  # before the first write: it fails, every time
    try:
        done = subprocess.run(
            [*COMMAND, *words],
            env=environment(ORCH_HOST=sock),
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    finally:
        os.close(theirs)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_pipe_for_both_streams_that_closes(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, HANG]
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(
            [*COMMAND, "add-model", "qwen", SOURCE],
            env=environment(ORCH_HOST=sock),
            stdout=theirs,
            stderr=theirs,
            timeout=DEADLINE_S,
            check=False,
        )
    finally:
        os.close(theirs)
    assert done.returncode == 141


def test_a_table_is_coloured_on_a_terminal_only(daemon: StubDaemon, sock: str) -> None:
    daemon.models = [model()]
    with Terminal("ls", env=environment(ORCH_HOST=sock)) as terminal:
        assert terminal.end() == 0
    assert "\x1b[32mready" in terminal.raw
    assert "\x1b" not in run("ls", env=environment(ORCH_HOST=sock, FORCE_COLOR="1")).stdout


@pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_switched_off(daemon: StubDaemon, sock: str, more: dict[str, str]) -> None:
    daemon.models = [model()]
    daemon.logs["qwen"] = ["\x1b[31mred\x1b[0m\n"]
    for words in (["ls"], ["status"], ["describe", "qwen"], ["logs", "qwen"], ["describe", "none"]):
        with Terminal(*words, env=environment(ORCH_HOST=sock, **more)) as terminal:
            terminal.end()
        assert "\x1b" not in terminal.raw, words


def test_no_color_keeps_the_bar_but_not_its_colours(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, model()]
    with Terminal("add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock, NO_COLOR="1")) as terminal:
        assert terminal.end() == 0
    assert "\x1b[?25l" in terminal.raw
    assert "\x1b[3" not in terminal.raw.replace("\x1b[?", "")


def test_a_dumb_terminal_gets_lines(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, model()]
    with Terminal("add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock, TERM="dumb")) as terminal:
        assert terminal.end() == 0
    assert terminal.text.splitlines()[0] == "qwen: starting: loading weights (2/5)"


def test_stdout_may_be_a_pipe_while_the_bar_is_drawn(daemon: StubDaemon, sock: str) -> None:
    daemon.watches["qwen"] = [STARTING, model()]
    with Terminal("--json", "add-model", "qwen", SOURCE, env=environment(ORCH_HOST=sock), piped=True) as terminal:
        assert terminal.end() == 0
        assert terminal.process.stdout is not None
        assert terminal.process.stdout.read().startswith(b'{\n  "name": "qwen"')


def test_a_narrow_terminal_shortens_the_source(daemon: StubDaemon, sock: str) -> None:
    daemon.models = [model(source="/srv/models/" + "deep/" * 20 + "Qwen2.5-7B")]
    with Terminal("ls", env=environment(ORCH_HOST=sock)) as terminal:
        assert terminal.end() == 0
    line = terminal.text.splitlines()[1]
    assert len(line) <= 100
    assert "Qwen2.5-7B" in line


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["ls"], 0),
        (["add-model", "bad", SOURCE], 1),
        (["ls", "--no-such"], 2),
        (["logs", "idle"], 3),
        (["plan", "load", "idle"], 75),
        (["describe", "none"], 4),
        (["ls", "--host", "/nonexistent/sock"], 69),
        (["start", "slow", "--timeout", "0.1"], 124),
        (["--version"], 0),
        (["-h"], 0),
    ],
)
def test_exit_codes_of_the_process(daemon: StubDaemon, sock: str, words: list[str], exit_code: int) -> None:
    daemon.models = [model("idle", "stopped"), model("slow")]
    daemon.logs["idle"] = []
    daemon.replies["GET", "/models/idle/plan"] = Reply(200, {"model": "idle", "fits": "later", "why": "b is pinned"})
    daemon.watches = {"bad": [model("bad", "failed", failure=failure())], "slow": [model("slow", "starting"), HANG]}
    done = run(*words, env=environment(ORCH_HOST=sock))
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr


def test_an_odd_locale_shows_escapes_instead_of_failing(daemon: StubDaemon, sock: str) -> None:
    daemon.logs["m"] = ["größe → 7\n"]
    env = environment(ORCH_HOST=sock, PYTHONIOENCODING="latin-1")
    done = subprocess.run([*COMMAND, "logs", "m"], env=env, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (0, b"gr\xf6\xdfe \\u2192 7\n")


@pytest.mark.parametrize("words", [["ls"], ["ls", "-o", "yaml"], ["--help"], ["events", "-f"]], ids=" ".join)
def test_a_full_disk_is_said_without_a_traceback(daemon: StubDaemon, sock: str, words: list[str]) -> None:
    daemon.models = [model()]
    daemon.replies["GET", "/events"] = Reply(200, {"events": [{"id": 1, "at": 1.0, "kind": "ready", "reason": ""}], "newest": 1})
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *words],
            env=environment(ORCH_HOST=sock),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: the output can not be written: No space left on device\n")


def test_a_closed_stdout_is_one_that_nobody_reads(daemon: StubDaemon, sock: str) -> None:
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "ls"]
    done = subprocess.run(words, env=environment(ORCH_HOST=sock), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
