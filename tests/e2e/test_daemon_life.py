"""The daemon comes and goes: refused where it cannot run, ended in order, and taken over from where it was killed."""

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import DEADLINE_S, Daemon, eventually


def serve(daemon: Daemon, **env: str) -> "subprocess.CompletedProcess[str]":
    """`orchestratord serve` that is expected to end by itself."""
    return command(daemon, "serve", **env)


def command(daemon: Daemon, *more: str, **env: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "orchestrator.daemon", *more]
    return subprocess.run(words, env={**daemon.env, **env}, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_sigterm_while_streaming_finishes_the_stream_then_ends_all(fresh: Fresh, client: Client) -> None:
    daemon = fresh().start()
    name, idle = daemon.name("a"), daemon.name("idle")
    daemon.add(name)
    daemon.add(idle, "--no-start")
    openai_client = client(daemon)
    with openai_client.completions.create(model=name, prompt="x", max_tokens=400, stream=True) as chunks:
        texts = [next(iter(chunks)).choices[0].text]
        with daemon.engines_held():
            daemon.signal(signal.SIGTERM)
            eventually(lambda: "stopping: engines finish" in daemon.log.read_text(), "the daemon has the signal")
            daemon.until_state(name, "draining")
            with pytest.raises(openai.InternalServerError) as refused:
                openai_client.completions.create(model=name, prompt="x", max_tokens=1)
            assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
            assert daemon.engine_processes(), "the engine was ended under a request"
        last = None
        for chunk in chunks:
            texts.append(chunk.choices[0].text)
            last = chunk.choices[0].finish_reason or last
    assert (last, len("".join(texts).split())) == ("length", 401)  # its name, then a word a token
    assert daemon.wait() == 0
    assert daemon.remains() == {}
    assert not daemon.admin.exists()
    said = daemon.log.read_text()
    order = ["stopping: engines finish", f"{name}: stopping", f"{name}: gone", "INFO    stopped"]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)
    assert "Traceback" not in said


def test_ctrl_c_ends_the_engines_too(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"))
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0
    assert daemon.remains() == {}


def test_a_terminal_that_is_closed_ends_the_engines_too_and_sighup_alone_does_not(fresh: Fresh) -> None:
    daemon = fresh()
    ours, theirs = pty.openpty()
    program = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        " os.execv(sys.executable, [sys.executable, '-m', 'orchestrator.daemon', 'serve'])"
    )
    with daemon.log.open("ab") as log:
        daemon.process = subprocess.Popen([sys.executable, "-c", program], env=daemon.env, stdin=theirs, stdout=log, stderr=log)
    os.close(theirs)
    eventually(lambda: "INFO    serving" in daemon.log.read_text(), "it serves")
    daemon.add(daemon.name("a"))
    daemon.signal(signal.SIGHUP)
    eventually(lambda: "reloaded: 0 models added" in daemon.log.read_text(), "a reload")
    os.close(ours)
    assert daemon.wait() == 0
    assert "stopping: engines finish" in daemon.log.read_text()
    assert daemon.remains() == {}


def test_while_the_daemon_ends_no_model_is_said_not_to_exist(fresh: Fresh, client: Client) -> None:
    """A client tries again after a 503, at the next daemon; after a 404 it gives up."""
    daemon = fresh().start()
    busy, idle = daemon.name("busy"), daemon.name("idle")
    daemon.add(busy)
    daemon.add(idle, "--no-start")
    openai_client = client(daemon)
    with openai_client.completions.create(model=busy, prompt="x", max_tokens=400, stream=True), daemon.engines_held():
        daemon.signal(signal.SIGTERM)
        daemon.until_state(busy, "draining")
        with pytest.raises(openai.APIStatusError) as refused:
            openai_client.completions.create(model=idle, prompt="x", max_tokens=1)
    assert daemon.wait() == 0
    assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")


def test_a_killed_daemon_leaves_its_engines_to_the_next_one(fresh: Fresh, client: Client) -> None:
    daemon = fresh().start()
    kept, idle = daemon.name("kept"), daemon.name("idle")
    before = daemon.add(kept)["engine"]
    daemon.add(idle, "--no-start", "--alias", daemon.name("other"))
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    assert len(daemon.engine_processes()) == 2, "the engine went with the daemon"

    daemon.start()
    after = daemon.until_state(kept, "ready")["engine"]
    assert (after["pid"], after["launch_id"], after["ipc_name"]) == (before["pid"], before["launch_id"], before["ipc_name"])
    assert {model["name"]: model["owner"] for model in daemon.get("/models")["models"]} == {kept: "api", idle: "api"}
    for model in (kept, daemon.name("other")):
        assert client(daemon).completions.create(model=model, prompt="x", max_tokens=1).choices[0].text
    assert "adopted" in [event["kind"] for event in daemon.model(kept)["events"]]
    for model in (kept, idle):
        assert daemon.ctl("rm", model).returncode == 0
    assert daemon.remains() == {}


def test_a_restart_that_keeps_the_engines_finishes_a_stream_loses_no_request_and_stays_the_process(fresh: Fresh, client: Client) -> None:
    daemon = fresh().start()
    name = daemon.name("a")
    before, url, pid = daemon.add(name)["engine"], daemon.url, daemon.process and daemon.process.pid
    openai_client = client(daemon)
    patient, late = client(daemon), list[str]()

    def ask() -> None:
        late.append(patient.completions.create(model=name, prompt="x", max_tokens=1).choices[0].text)

    with openai_client.completions.create(model=name, prompt="x", max_tokens=300, stream=True) as chunks:
        texts = [next(iter(chunks)).choices[0].text]
        with daemon.engines_held():
            assert daemon.ctl("restart-daemon", "--keep-engines", "--no-wait").returncode == 0
            eventually(lambda: "restarting: requests that run are finished" in daemon.log.read_text(), "it was told")
            asking = threading.Thread(target=ask)
            asking.start()
        last = None
        for chunk in chunks:
            texts.append(chunk.choices[0].text)
            last = chunk.choices[0].finish_reason or last
    asking.join(DEADLINE_S)
    assert (last, len("".join(texts).split())) == ("length", 301)
    assert len(late) == 1
    after = daemon.until_state(name, "ready")["engine"]
    assert (after["pid"], after["launch_id"], daemon.url) == (before["pid"], before["launch_id"], url)
    assert daemon.get("/status")["pid"] == pid
    assert daemon.process is not None
    assert daemon.process.poll() is None
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}
    assert "Traceback" not in daemon.log.read_text()


def test_a_restart_ends_the_engines_in_order_and_starts_anew(fresh: Fresh) -> None:
    daemon = fresh().start()
    name, url = daemon.name("a"), daemon.url
    before = daemon.add(name, "--preload")["engine"]
    done = daemon.ctl("restart-daemon", "--timeout", f"{DEADLINE_S:.0f}s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the daemon is back after ")
    after = daemon.until_state(name, "ready")["engine"]
    assert after["launch_id"] != before["launch_id"]
    assert daemon.url == url
    said = daemon.log.read_text()
    order = ["restarting: engines finish", f"{name}: stopping", f"{name}: gone", "INFO    starting again"]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)


def test_a_daemon_that_could_not_start_again_is_not_restarted(fresh: Fresh) -> None:
    daemon = fresh()
    file = daemon.folder / "c.yaml"
    file.write_text("{}")
    daemon.env["ORCH_CONFIG"] = str(file)
    daemon.start()
    file.write_text("lisen: {}")
    done = daemon.ctl("restart-daemon", "--keep-engines")
    assert done.returncode == 78
    assert f"{file}:1:1: lisen: unknown setting" in done.stderr
    assert daemon.get("/status")["loop"]["errors"] == 0


def test_an_engine_whose_spec_changed_while_the_daemon_was_away_is_replaced(fresh: Fresh) -> None:
    daemon = fresh()
    name, file = daemon.name("a"), daemon.folder / "c.yaml"
    daemon.env["ORCH_CONFIG"] = str(file)
    file.write_text(f"models: {{{name}: {{source: {daemon.model_folder}, preload: true}}}}")
    daemon.start()
    before = daemon.until_state(name, "ready")["engine"]
    daemon.kill()
    file.write_text(f"models: {{{name}: {{source: {daemon.model_folder}, preload: true, args: [--max-model-len, '4096']}}}}")
    daemon.start()

    def replaced() -> bool:
        model = daemon.model(name)
        return bool(model["state"] == "ready" and model["engine"]["launch_id"] != before["launch_id"])

    eventually(replaced, "another engine serves")
    assert len(daemon.engine_processes()) == 2
    assert len(daemon.segments()) == 1


def test_what_a_lost_state_file_no_longer_names_is_ended_and_another_daemons_engines_are_not(fresh: Fresh) -> None:
    daemon, other = fresh().start(), fresh().start()
    daemon.add(daemon.name("a"))
    theirs = other.add(other.name("b"))["engine"]["pid"]
    daemon.kill()
    for path in (daemon.folder / "s").glob("state.db*"):
        path.unlink()
    daemon.start()
    eventually(lambda: daemon.remains() == {}, "the unknown engine is ended and cleaned up after")
    assert "a former launch that no record names: it is ended" in daemon.log.read_text()
    assert other.model(other.name("b"))["engine"]["pid"] == theirs
    assert other.model(other.name("b"))["state"] == "ready"


def test_engines_without_a_daemon_are_ended_by_a_command_unless_the_daemon_was_killed(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"))
    assert "is in use by another orchestratord" in command(daemon, "end-engines").stderr
    daemon.kill()
    kept = command(daemon, "end-engines", "--unless-killed", SERVICE_RESULT="watchdog")
    assert (kept.returncode, len(daemon.engine_processes())) == (0, 2)
    done = command(daemon, "end-engines", "--unless-killed", SERVICE_RESULT="timeout")
    assert (done.returncode, done.stderr) == (0, "1 engines were left: ended\n")
    assert daemon.remains() == {}
    assert command(daemon, "end-engines").stderr == "no engine was left\n"


def test_what_died_with_the_daemon_is_cleaned_up_by_the_next_one(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"), "--idle-timeout", "1h")
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    for process in daemon.engine_processes():
        os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: not daemon.engine_processes(), "the engine is dead")
    assert set(daemon.remains()) >= {"segments", "socket folders"}
    daemon.start()
    eventually(lambda: daemon.remains() == {}, f"nothing is left: {daemon.remains()}")
    daemon.until_state(daemon.name("a"), "stopped")


def test_a_second_daemon_is_refused_and_the_first_goes_on(daemon: Daemon) -> None:
    done = serve(daemon)
    assert done.returncode == 1
    assert f"{daemon.folder}/s is in use by another orchestratord (pid {daemon.process and daemon.process.pid})" in done.stderr
    done = serve(daemon, ORCH_DIRS__STATE=str(daemon.folder / "other"))
    assert done.returncode == 1
    assert f"{daemon.folder}/r is in use by another orchestratord" in done.stderr
    assert daemon.get("/status")["loop"]["errors"] == 0


def test_a_port_in_use(fresh: Fresh) -> None:
    daemon = fresh()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(daemon, ORCH_LISTEN__PORT=str(port))
    assert done.returncode == 1
    assert f"listen: 127.0.0.1:{port} is in use by another program: stop that, or set listen.port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_place_of_the_admin_socket_is_not_removed(fresh: Fresh) -> None:
    daemon = fresh()
    precious = daemon.folder / "precious"
    for path in (precious, daemon.folder):
        precious.write_text("mine")
        done = serve(daemon, ORCH_ADMIN__SOCKET=str(path))
        assert done.returncode == 1
        assert f"admin.socket: {path}: " in done.stderr
        assert "Traceback" not in done.stderr
        assert precious.read_text() == "mine"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_state_folder_that_is_not_writable(fresh: Fresh) -> None:
    daemon = fresh()
    program = "import os; from orchestrator.daemon import main; os.setuid(65534); main(['serve'])"
    daemon.folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", program], env=daemon.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert f"orchestratord: {daemon.folder}/s: Permission denied: make it writable for this user" in done.stderr


def test_no_gpu_driver_is_said_with_its_mend(fresh: Fresh) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver here")
    done = serve(fresh(), ORCH_GPUS__SOURCE="nvml")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_follower_does_not_hold_up_the_end(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"), "--no-start")
    command = [sys.executable, "-m", "orchestrator.cli", "events", "--follow"]
    env = {**daemon.env, "ORCH_HOST": str(daemon.admin)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as following:
        try:
            assert following.stdout is not None
            assert daemon.name("a") in following.stdout.readline()
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
        finally:
            following.kill()  # it would wait for the next daemon
