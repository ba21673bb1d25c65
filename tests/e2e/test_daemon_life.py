"""The daemon comes and goes: refused where it cannot run, ended in order, and taken over from where it was killed."""

import os
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
    words = [sys.executable, "-m", "orchestrator.daemon", "serve"]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_the_engines_too(fresh: Fresh, number: signal.Signals) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"))
    daemon.signal(number)
    assert daemon.wait() == 0
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


def test_a_watch_does_not_hold_up_the_end(fresh: Fresh) -> None:
    daemon = fresh().start()
    daemon.add(daemon.name("a"), "--no-start")
    watching = threading.Thread(target=daemon.ctl, args=("logs", "--follow", daemon.name("a")))
    watching.start()
    try:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    finally:
        watching.join(DEADLINE_S)
    assert not watching.is_alive()
