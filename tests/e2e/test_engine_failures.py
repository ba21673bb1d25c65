"""Engines die: while they serve, and before they ever did. The daemon says so, cleans up, and goes on."""

import os
import signal

import openai
import pytest

from tests.e2e.conftest import Client
from tests.e2e.running import Daemon, eventually


def test_an_engine_killed_while_it_streams_comes_back(daemon: Daemon, client: Client) -> None:
    name = daemon.name("a")
    engine = daemon.add(name)["engine"]
    openai_client = client(daemon)
    with openai_client.completions.create(model=name, prompt="x", max_tokens=4000, stream=True) as chunks:
        assert next(iter(chunks)).choices[0].text
        for process in daemon.engine_processes():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError):  # never a silent short success
            for _ in chunks:
                pass
    # Until its end is seen a request is still sent to it, and answered 502 with Retry-After.
    eventually(lambda: "stopping" in [event["kind"] for event in daemon.model(name)["events"]], "its end is seen")
    answer = openai_client.completions.create(model=name, prompt="x", max_tokens=3)
    assert answer.choices[0].text.startswith(name)
    again = daemon.model(name)["engine"]
    assert again["pid"] != engine["pid"]
    assert again["ipc_name"] != engine["ipc_name"]
    assert [path.name for path in daemon.segments()] == [again["ipc_name"]]
    kinds = [event["kind"] for event in daemon.model(name)["events"]]
    assert kinds[kinds.index("backoff") :] == ["backoff", "starting", "ready"]
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}


def test_an_engine_that_dies_at_its_start(daemon: Daemon) -> None:
    name = daemon.name("bad")
    done = daemon.ctl("add-model", name, str(daemon.model_folder), "--env", "SIM_FAULT=die_at_start")
    assert done.returncode == 1
    assert f"{name} failed to start" in done.stderr
    assert "RuntimeError: simulated failure at start" in done.stderr  # its own last words
    assert f"orchestratorctl logs {name}" in done.stderr
    assert daemon.model(name)["state"] in ("backoff", "stopping", "starting", "waiting", "failed")
    assert "simulated failure at start" in daemon.ctl("logs", name).stdout
    assert daemon.ctl("rm", name).returncode == 0
    eventually(lambda: daemon.remains() == {}, f"nothing is left; {daemon.remains()}")
    assert daemon.get("/status")["loop"]["errors"] == 0


def test_a_mistake_in_the_arguments_is_final(daemon: Daemon) -> None:
    name = daemon.name("typo")
    done = daemon.ctl("add-model", name, str(daemon.model_folder), "--", "--max-modle-len", "4096")
    assert done.returncode == 1
    assert "unrecognized arguments: --max-modle-len" in done.stderr
    daemon.until_state(name, "failed")
    assert daemon.ctl("rm", name).returncode == 0
    assert daemon.remains() == {}
