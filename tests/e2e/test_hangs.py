"""An engine hangs in the middle of its work, with /health 200 or without: its requests end with an error, and those that waited are
answered by the next one. The daemon's patience is short here: 2 s without a token, then 1 s for a probe.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.conftest import Client, daemons
from tests.e2e.running import Daemon, _Unix, eventually

IMPATIENT = """
from orchestrator.drivers import pulse
watch, pulse.PROBE_S = pulse.watch, 1.0
pulse.watch = lambda run, hang_s: watch(run, 2.0)
"""


@pytest.fixture(scope="module")
def impatient() -> Iterator[Daemon]:
    with daemons() as make:
        yield make(IMPATIENT).start()


def set_fault(daemon: Daemon, name: str, fault: str) -> None:
    """At the engine of now; the next one has none."""
    (socket,) = (daemon.folder / "r/engines").glob(f"{daemon.model(name)['engine']['ipc_name'].rpartition('-')[2]}/api.sock")
    with contextlib.closing(_Unix(socket)) as engine:
        engine.request("POST", "/sim/fault", json.dumps({"set": fault}))
        assert engine.getresponse().status == 200


def hang(daemon: Daemon, name: str, how: str) -> None:
    leader = daemon.model(name)["engine"]["pid"]
    core = next(process.pid for process in daemon.engine_processes() if os.getsid(process.pid) == leader != process.pid)
    match how:
        case "EngineCore stops":
            os.kill(core, signal.SIGSTOP)
        case "API server stops":
            os.kill(leader, signal.SIGSTOP)
        case fault:
            set_fault(daemon, name, fault)


@pytest.mark.parametrize("how", ["hang_after:0", "stall_after:0", "EngineCore stops", "API server stops"])
def test_an_engine_that_hangs_is_replaced_and_its_queue_is_served(impatient: Daemon, client: Client, how: str) -> None:
    daemon, name = impatient, impatient.name(how.lower().replace(" ", "-").replace(":", "-").replace("_", "-"))
    engine = daemon.add(name, "--max-concurrency", "1")["engine"]
    users = client(daemon)
    users.completions.create(model=name, prompt="x", max_tokens=600)  # 6 s: its tokens are seen
    with ThreadPoolExecutor(3) as pool, users.completions.create(model=name, prompt="x", max_tokens=4000, stream=True) as chunks:
        assert next(iter(chunks)).choices[0].text
        queued = [pool.submit(users.completions.create, model=name, prompt="x", max_tokens=3) for _ in range(3)]
        eventually(lambda: daemon.model(name)["waiting"] == 3, "they wait")
        hang(daemon, name, how)
        with pytest.raises(openai.APIError):  # and no silent short success
            for _ in chunks:
                pass
        answers = [waiting.result() for waiting in queued]
    assert all(answer.choices[0].text.startswith(name) for answer in answers)
    again = daemon.model(name)
    assert again["engine"]["pid"] != engine["pid"]
    events = {event["kind"]: event["reason"] for event in again["events"]}
    said = "its API server does not answer" if how == "API server stops" else "EngineCore hangs, while /health is 200"
    assert events["stopping"].startswith(f"the engine failed: {said}: nothing has moved for ")
    assert "attempt 2 of 5 in 2s" in events["backoff"]
    assert daemon.ctl("rm", name).returncode == 0
    eventually(lambda: daemon.remains() == {}, "nothing is left")
    assert daemon.get("/status")["loop"]["errors"] == 0
