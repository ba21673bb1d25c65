"""NVML's process hangs, crashes and comes back while a stream runs: the stream is whole, limits stay, status says why, and it heals."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from orchestrator.drivers.simgpu import SimGpus
from orchestrator.policy.units import GIB
from tests.e2e.conftest import Client, Fresh
from tests.e2e.running import DEADLINE_S, ROOT, Daemon, eventually

FAKE = Path(__file__).parents[1] / "support/fake_nvml"
TOKENS = 600


class Box:
    """A daemon that reads a simulated card through NVML's process and a fake pynvml."""

    def __init__(self, fresh: Fresh, **env: str) -> None:
        engine = {"kind": "simulated", "launch_server": False}
        self.daemon: Daemon = fresh(ORCH_GPUS__SOURCE="nvml", ORCH_ENGINES=json.dumps({"default": engine}), SIM_STEP_S="0.01", **env)
        self.cards = self.daemon.folder / "r/simgpu"
        SimGpus(self.cards, 1, 24 * GIB)
        self.daemon.env |= {"PYTHONPATH": f"{FAKE}:{ROOT}", "FAKE_NVML": str(self.cards), "SIM_GPU_DIR": str(self.cards)}

    def fault(self, what: str) -> None:
        (self.cards / "fault").write_text(what)

    def pid(self) -> int:
        return int((self.cards / "pids").read_text().split()[-1])

    def gpu(self) -> Any:
        return self.daemon.get("/status")["gpus"][0]

    def limits(self) -> dict[str, int]:
        return {path.name: struct.unpack("=q", path.read_bytes()[:8])[0] for path in self.daemon.segments()}

    def take_foreign(self, size_bytes: int) -> None:
        """By this very process."""
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        (self.cards / f"held/GPU-sim-0/{os.getpid()}.{started}").write_bytes(struct.pack("=q", size_bytes))

    def looks(self, count: int) -> None:
        ticks = self.daemon.get("/status")["loop"]["ticks"]
        eventually(lambda: self.daemon.get("/status")["loop"]["ticks"] >= ticks + count, f"{count} more looks")


class Stream(threading.Thread):
    def __init__(self, api: openai.OpenAI, model: str) -> None:
        super().__init__()
        self._api, self._model = api, model
        self.words: list[str] = []
        self.end: str | None = None

    def run(self) -> None:
        with self._api.completions.create(model=self._model, prompt="x", max_tokens=TOKENS, stream=True) as chunks:
            for chunk in chunks:
                self.words += chunk.choices[0].text.split()
                self.end = chunk.choices[0].finish_reason or self.end

    def whole(self) -> bool:
        self.join(DEADLINE_S)
        return (self.end, len(self.words)) == ("length", TOKENS + 1)  # its name, then a word a token


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die SIGSEGV", "was killed by SIGSEGV"),
        ("hang", "has not answered for"),
        ("code 18", "the driver was upgraded under a running kernel module: reboot"),
        ("lost 0", "GPU is lost"),
    ],
)
def test_while_nvml_is_away_streams_run_limits_stay_and_the_reason_is_said(fresh: Fresh, client: Client, fault: str, said: str) -> None:
    box = Box(fresh)
    daemon = box.daemon.start()
    assert daemon.get("/status")["gpu_source"] == "nvml"
    name = daemon.name("a")
    daemon.add(name)
    api = client(daemon)
    box.looks(20)  # its limit is where it stays
    stream = Stream(api, name)
    stream.start()
    eventually(lambda: stream.words, "it streams")
    box.fault(fault)
    found = eventually(lambda: (gpu := box.gpu())["error"] and gpu, "its reading is old")
    assert said in found["error"]
    limits = box.limits()
    box.take_foreign(20 * GIB)
    box.looks(8)
    after = box.gpu()
    assert box.limits() == limits
    assert after["free_bytes"] == found["free_bytes"]
    assert after["age_s"] > found["age_s"]
    assert said in daemon.log.read_text()
    assert api.completions.create(model=name, prompt="x", max_tokens=3).choices[0].finish_reason == "length"
    assert stream.whole()

    box.fault("")
    if fault == "lost 0":  # as with a card that is reset: a new process of NVML sees it again
        os.kill(box.pid(), signal.SIGKILL)
    eventually(lambda: not box.gpu()["error"], "it is read again")
    eventually(lambda: sum(box.limits().values()) < 5 * GIB < sum(limits.values()), "limits yield to what was grabbed meanwhile")
    assert daemon.get("/status")["loop"]["errors"] == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "has not answered for 5 s")])
def test_nvmls_process_killed_or_stopped_while_a_stream_runs(fresh: Fresh, client: Client, number: signal.Signals, said: str) -> None:
    box = Box(fresh)
    daemon = box.daemon.start()
    name = daemon.name("a")
    daemon.add(name)
    stream = Stream(client(daemon), name)
    stream.start()
    eventually(lambda: stream.words, "it streams")
    pid, limits = box.pid(), box.limits()
    os.kill(pid, number)
    eventually(lambda: said in daemon.log.read_text(), "the log says so")
    eventually(lambda: box.pid() != pid and not box.gpu()["error"], "there is a new one, and it answers")
    assert not psutil.pid_exists(pid), "a zombie stayed"
    assert stream.whole()
    assert box.limits().keys() == limits.keys()
    assert daemon.model(name)["state"] == "ready"


def test_it_ends_with_the_daemon_killed_or_stopped_in_order(fresh: Fresh) -> None:
    box = Box(fresh)
    for end in (signal.SIGKILL, signal.SIGTERM):
        box.daemon.start()
        pid = box.pid()
        os.kill(pid, signal.SIGSTOP)  # also one that hangs
        box.daemon.signal(end)
        box.daemon.wait()
        eventually(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "it is gone")  # type: ignore[misc]
        assert box.daemon.remains() == {}


def test_auto_takes_simulated_cards_where_nvml_fails(fresh: Fresh) -> None:
    box = Box(fresh, ORCH_GPUS__SIMULATED='{"count": 2}')
    box.daemon.env["ORCH_GPUS__SOURCE"] = "auto"
    box.fault("code 12")
    box.daemon.start()
    status = box.daemon.get("/status")
    assert (status["gpu_source"], len(status["gpus"])) == ("simulated", 2)
    assert "no NVIDIA driver on this machine" in box.daemon.log.read_text()


@pytest.mark.parametrize(
    ("fault", "said"), [("die SIGSEGV", "NVML: its process was killed by SIGSEGV"), ("code 4", "groups video and render")]
)
def test_a_driver_that_fails_at_the_start_is_said(fresh: Fresh, fault: str, said: str) -> None:
    box = Box(fresh)
    box.fault(fault)
    words = [sys.executable, "-m", "orchestrator.daemon", "serve"]
    done = subprocess.run(words, env=box.daemon.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
