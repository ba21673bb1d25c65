"""What a daemon tells of itself: a line for each request where that is wished, why its engines end, and events through its restart."""

import json
import signal
import subprocess
from typing import Any

from tests.cli.running import COMMAND
from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import Daemon, eventually


def lines(daemon: Daemon, **like: Any) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in daemon.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line.items() >= like.items()]


def test_requests_and_the_end_are_told_and_events_are_followed_through_a_restart(fresh: Fresh, client: Client) -> None:
    daemon = fresh(ORCH_LOG__FORMAT="json", ORCH_LOG__ACCESS="true").start()
    name = daemon.name("m")
    command = [*COMMAND, "events", "-f", "--json", "-n", "0", "--kind", "ready"]
    env, pipe = {**daemon.env, "ORCH_HOST": str(daemon.admin)}, subprocess.PIPE
    following = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
    try:
        assert daemon.ctl("add-model", name, str(daemon.model_folder), "--no-start").returncode == 0
        users = client(daemon)
        users.completions.create(model=name, prompt="1", max_tokens=2)  # it waits for its model: by ASGI
        list(users.completions.create(model=name, prompt="1", max_tokens=2, stream=True))  # directly
        eventually(lambda: len(lines(daemon, logger="orchestrator.access")) == 2, "a line for each request")
        one, two = lines(daemon, logger="orchestrator.access")
        for told in (one, two):
            assert told.items() >= {"kind": "request", "model": name, "route": "POST /v1/completions", "status": 200}.items()
            assert told["who"].startswith("key ")  # that nobody made here: of it nothing is told
            assert (told["prompt_tokens"] > 0, told["completion_tokens"], len(told["request_id"])) == (True, 2, 32)
        assert 0 < one["wait_s"] <= one["total_s"]
        assert two["wait_s"] < one["wait_s"]
        assert two["wait_s"] < two["first_s"] <= two["total_s"]
        assert following.stdout is not None
        first = json.loads(following.stdout.readline())
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert [line["message"] for line in lines(daemon, model=name, kind="stopping")] == [f"{name}: stopping: the daemon stops"]
        daemon.start()
        assert daemon.ctl("load", name).returncode == 0
        second = json.loads(following.stdout.readline())
        assert [(event["model"], event["kind"]) for event in (first, second)] == [(name, "ready")] * 2
        assert first["id"] < second["id"]
    finally:
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=40)
    assert (following.returncode, "the daemon is back" in said) == (130, True)
