"""How an engine behaves towards whoever watches it from outside: the simulated one and real vLLM + kvcached pass the same tests.

Every manner here is one that the daemon relies on or guards against. The real engine is asked on a GPU box:

    ENGINE_PYTHON=/opt/orchestrator/engine/bin/python ENGINE_MODEL=/models/qwen-0.5b pytest -m gpu tests/contract/test_engine_manners.py

and over two GPUs too, with ENGINE_GPUS=2.
"""

import asyncio
import glob
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers import kvcached, processes, vllm
from orchestrator.drivers.launch_server import LaunchServers
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import GpuReading, Segment

GIB, MIB = 1 << 30, 1 << 20
BUNDLE = 96 * MIB  # Qwen2.5-0.5B: 24 layers, K and V, 2 MiB pages
CEILING = 20 * BUNDLE
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768,
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
    "tie_word_embeddings": True,
}  # fmt: skip
LONG_PROMPT = "a " * 12_000  # 24,000 tokens: three pages of 8192 tokens; two of 16384 over two GPUs, where each has one of the two KV heads


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("engine", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass
class Engine:
    """One launched engine, its folder, and what the card shows of it."""

    launch: Launch
    folder: Path
    process: processes.Process
    child: processes.Child
    gpus: Callable[[], list[GpuReading]]
    patience_s: float

    @property
    def scarce_bytes(self) -> int:
        """A limit that LONG_PROMPT does not fit into: the null block has one page already."""
        return 2 * BUNDLE // len(self.launch.gpus)

    @property
    def socket(self) -> str:
        return str(self.folder / "api.sock")

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
        connection = _Connection(self.socket, timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text

    def complete(self, prompt: str, tokens: int = 1, timeout: float = 60) -> Any:
        body = {"model": "a-model", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        status, answer = self.call("POST", "/v1/completions", body, timeout)
        assert status == 200, answer
        return answer

    def rpc(self, method: str, *args: object) -> dict[str, Any]:
        status, answer = self.call("POST", "/collective_rpc", {"method": method, "args": [str(arg) for arg in args]})
        assert status == 200, answer
        assert len(answer["results"]) == 1
        result: dict[str, Any] = answer["results"][0]
        return result

    def segment(self) -> Segment:
        found = kvcached.read(self.launch.ipc_name)
        assert found is not None
        return found

    def held_bytes(self) -> int:
        members = processes.members(self.process)
        return sum(size for gpu in self.gpus() for pid, size in gpu.processes.items() if pid in members)

    def until(self, condition: Callable[[], bool], what: str, patience_s: float | None = None) -> None:
        deadline = time.monotonic() + (patience_s or self.patience_s)
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}\n{self.log()[-3000:]}"
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "engine.log").read_text(errors="replace")

    def ready(self) -> bool:
        if self.child.poll() is not None:
            raise AssertionError(f"the engine ended with {self.child.poll()}:\n{self.log()[-3000:]}")
        try:
            return self.call("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False

    def left(self) -> dict[str, bool]:
        name = self.launch.ipc_name
        return {
            "segment": Path("/dev/shm", name).exists(),
            "tensor-parallel sockets": bool(glob.glob(f"/tmp/kvcached-tp-{name}-*")),
            "api socket": Path(self.socket).exists(),
        }

    def end(self) -> None:
        processes.signal_session(self.process, signal.SIGKILL)
        self.child.wait()
        self.until(lambda: not processes.members(self.process), "its session ended")
        kvcached.remove(self.launch.ipc_name)


# Where a box forbids NVLink multicast, engines must be told too.
AS_HERE = {key: value for key, value in os.environ.items() if key.startswith(("TORCH_SYMM_MEM_", "NVSHMEM_", "VLLM_ALLREDUCE_"))}
NO_VENV = pytest.mark.skipif("ENGINE_PYTHON" not in os.environ, reason="no engine venv: set ENGINE_PYTHON and ENGINE_MODEL")
TWO_GPUS = pytest.mark.skipif(os.environ.get("ENGINE_GPUS", "1") == "1", reason="one GPU: ENGINE_GPUS=2 says that there are two")
# kind, whether it is forked from a launch server, and over how many GPUs it is: nothing else may tell them from each other
KINDS = [
    pytest.param(("simulated", False, 1), id="simulated"),
    pytest.param(("simulated", True, 1), id="simulated-forked"),
    pytest.param(("simulated", True, 2), id="simulated-forked-on-two"),
    pytest.param(("vllm", False, 1), id="vllm", marks=[pytest.mark.gpu, NO_VENV]),
    pytest.param(("vllm", True, 1), id="vllm-forked", marks=[pytest.mark.gpu, NO_VENV]),
    pytest.param(("vllm", True, 2), id="vllm-forked-on-two", marks=[pytest.mark.gpu, NO_VENV, TWO_GPUS]),
]


@pytest.fixture(scope="module", params=KINDS)
def launcher(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Starts engines of one kind; each test that changes one for good takes its own."""
    home = Path(tempfile.mkdtemp(prefix="manners-", dir="/tmp"))
    started: list[Engine] = []
    gpus: Callable[[], list[GpuReading]]
    environ = dict(os.environ)
    kind, forked, ranks = request.param
    if kind == "simulated":
        simulated = SimGpus(home / "gpu", ranks, 16 * GIB)
        environ |= {"SIM_GPU_DIR": str(simulated.folder), "SIM_LOAD_S": "0"}
        venv = vllm.EngineVenv(kind="simulated", python=Path(sys.executable))
        model, gpus = home / "model", lambda: list(simulated.read())
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SHAPE))
    else:
        from orchestrator.drivers.nvml import Nvml

        nvml = Nvml()
        env = {"HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", **AS_HERE}
        venv = vllm.EngineVenv(python=Path(os.environ["ENGINE_PYTHON"]), env=env, args=["--enforce-eager", "--load-format", "dummy"])
        model, gpus = Path(os.environ["ENGINE_MODEL"]), lambda: list(nvml.read())
    patience_s = 10.0 if kind == "simulated" else 120.0
    servers = LaunchServers({"default": venv}, home)
    processes.adopt_orphans()

    def start(*args: str, wait: bool = True) -> Engine:
        number = len(started)
        spec = ModelSpec(name="a-model", source=str(model), args=args, tensor_parallel_size=ranks)
        cards = tuple(gpu.uuid for gpu in gpus()[:ranks])
        launch = Launch(f"m{number}", f"manners-{os.getpid()}-{number}", spec, cards, 0, 0, CEILING)
        folder = home / launch.id
        folder.mkdir()
        # A limit that was written before the start: the engine must be seen to overwrite it.
        Path("/dev/shm", launch.ipc_name).write_bytes(kvcached.LAYOUT.pack(7, 7, 7))
        command = vllm.command(launch, venv, folder / "api.sock")
        env, log = vllm.environment(launch, venv, folder, environ), folder / "engine.log"
        process, child = loop.run(servers.fork("default", command, env, log)) if forked else processes.spawn(command, env, log)
        assert child is not None
        engine = Engine(launch, folder, process, child, gpus, patience_s)
        started.append(engine)
        if wait:
            engine.until(engine.ready, "healthy")
            engine.until(lambda: engine.segment().used_bytes > 0, "its null page mapped")
        return engine

    with asyncio.Runner() as loop:
        yield start
        for engine in started:
            engine.end()
        loop.run(servers.close())
    processes.adopt_orphans(False)
    processes.reap()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def engine(launcher: Callable[..., Engine]) -> Engine:
    """One engine for the tests that leave it as it was."""
    found = launcher("--no-enable-prefix-caching")
    assert found.rpc("kv_empty_cache")["ok"] is True
    return found


def test_it_overwrites_a_limit_that_was_written_before_its_start(launcher: Callable[..., Engine], engine: Engine) -> None:
    assert engine.segment().limit_bytes == CEILING


def test_used_at_ready_is_one_bundle(engine: Engine) -> None:
    assert engine.segment().used_bytes == BUNDLE
    status = engine.rpc("kv_status")
    assert (status["bundle_bytes"], status["capacity_bytes"]) == (BUNDLE, CEILING)


def test_bad_requests_have_their_status(engine: Engine) -> None:
    assert engine.call("POST", "/v1/completions", {"model": "other", "prompt": "x"})[0] == 404
    assert engine.call("POST", "/v1/completions", ["no object"])[0] == 500
    status, answer = engine.call("POST", "/v1/completions", {"model": "a-model", "prompt": "a " * 40_000, "max_tokens": 1})
    assert status == 400
    assert "maximum" in json.dumps(answer)


def test_an_idle_engine_applies_a_lower_limit_only_in_its_next_allocation(engine: Engine) -> None:
    _reserve(engine)
    before = engine.segment()
    kvcached.write_limit(engine.launch.ipc_name, BUNDLE)
    assert not _happens(lambda: engine.segment().mapped_bytes < before.mapped_bytes, within_s=0.5)
    engine.complete("x")
    engine.until(lambda: engine.segment().prealloc_bytes == 0, "the reserve unmapped by the allocation")
    _restore(engine)


def test_a_limit_by_rpc_is_in_force_without_an_allocation(engine: Engine) -> None:
    _reserve(engine)
    answer = _limit(engine, BUNDLE)
    assert answer["status"] == "applied"
    assert answer["effective_limit_bytes"] == BUNDLE
    assert engine.segment().mapped_bytes == BUNDLE
    _restore(engine)


def test_a_limit_by_rpc_is_not_applied_before_the_watcher_saw_the_segment(engine: Engine) -> None:
    """kvcached's watcher looks every 0.1 s. An allocation before that would put the old limit back."""
    _limit(engine, 8 * BUNDLE)
    kvcached.write_limit(engine.launch.ipc_name, 4 * BUNDLE)
    if engine.rpc("kv_limit", 4 * BUNDLE, time.time_ns())["settled"]:
        pytest.skip("the watcher happened to look in between")
    _limit(engine, 4 * BUNDLE)
    assert engine.rpc("kv_status")["limit_bytes"] == 4 * BUNDLE
    _restore(engine)


def test_raising_a_starved_engines_limit_again_and_again_does_it_no_harm(launcher: Callable[..., Engine]) -> None:
    """With prefix caching on. An EngineCore once died right after raises that were applied before the watcher had seen the segment."""
    engine = launcher()
    for turn in range(6):
        engine.call("POST", "/reset_prefix_cache")
        _limit(engine, engine.scarce_bytes)
        answers: list[Any] = []
        asking = threading.Thread(target=_ask_into, args=(engine, answers, f"{turn} {LONG_PROMPT}"[: len(LONG_PROMPT)]))
        asking.start()
        engine.until(lambda: engine.rpc("kv_status")["requests_waiting"] > 0, "the request waits")
        _limit(engine, CEILING)
        asking.join(30)
        assert answers, engine.log()[-3000:]


def test_a_limit_above_the_start_up_total_is_clamped_by_rpc(engine: Engine) -> None:
    answer = engine.rpc("kv_limit", 10 * CEILING, time.time_ns())
    assert answer["effective_limit_bytes"] == CEILING
    _restore(engine)


def test_a_starved_engine_stays_stuck_when_the_segment_alone_is_raised_and_the_rpc_cures_it(engine: Engine) -> None:
    assert _limit(engine, engine.scarce_bytes)["status"] == "applied"
    answers: list[Any] = []
    asking = threading.Thread(target=_ask_into, args=(engine, answers, LONG_PROMPT))
    asking.start()
    engine.until(lambda: engine.rpc("kv_status")["requests_waiting"] > 0, "the request waits")
    kvcached.write_limit(engine.launch.ipc_name, CEILING)
    assert not _happens(lambda: bool(answers), within_s=1.0)
    assert engine.call("GET", "/health")[0] == 200
    _limit(engine, CEILING)
    asking.join(30)
    assert answers


def test_trim_gives_back_reserved_pages(engine: Engine) -> None:
    _reserve(engine)
    assert engine.rpc("kv_trim")["mapped_bytes"] <= 2 * BUNDLE
    assert engine.segment().mapped_bytes <= 2 * BUNDLE


def test_asleep_it_holds_its_weights_in_host_memory_and_takes_limits_and_awake_it_answers(engine: Engine) -> None:
    """And the host memory stays its own after the wake: PyTorch keeps what it has pinned."""
    awake = engine.held_bytes()
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": False}
    assert engine.call("POST", "/sleep?level=1", timeout=120)[0] == 200
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": True}
    assert engine.call("GET", "/health")[0] == 200
    engine.until(lambda: engine.held_bytes() < awake - 800 * MIB, "its memory came back", 10)
    pinned = engine.rpc("kv_host_memory")["host_bytes"]
    assert pinned > 900 * MIB
    engine.rpc("kv_trim")
    assert _limit(engine, 2 * BUNDLE)["status"] == "applied"
    assert engine.call("POST", "/wake_up", timeout=60)[0] == 200
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": False}
    assert engine.complete("hello", tokens=2)["usage"]["completion_tokens"] == 2
    assert engine.rpc("kv_host_memory")["host_bytes"] == pinned
    _limit(engine, CEILING)


def test_an_unknown_argument_ends_it_with_code_2(launcher: Callable[..., Engine]) -> None:
    engine = launcher("--no-such-argument", wait=False)
    assert engine.child.wait(engine.patience_s) == 2
    assert "unrecognized arguments" in engine.log()


def test_sigterm_removes_the_segment_and_leaves_socket_and_folder(launcher: Callable[..., Engine]) -> None:
    engine = launcher()
    assert engine.held_bytes() > 0
    processes.signal_session(engine.process, signal.SIGTERM)
    assert engine.child.wait(engine.patience_s) == 0
    engine.until(lambda: not processes.members(engine.process), "nobody left")
    assert engine.left() == {"segment": False, "tensor-parallel sockets": True, "api socket": True}


def test_a_killed_api_server_leaves_a_core_that_holds_its_memory(launcher: Callable[..., Engine]) -> None:
    engine = launcher()
    before = engine.held_bytes()
    os.kill(engine.process.pid, signal.SIGKILL)
    engine.child.wait()
    assert not _happens(lambda: not processes.members(engine.process), within_s=1.0)
    assert engine.held_bytes() == before > 0
    processes.signal_session(engine.process, signal.SIGKILL)
    engine.until(lambda: not processes.members(engine.process), "the core ended too")
    assert engine.left() == {"segment": True, "tensor-parallel sockets": True, "api socket": True}


def test_memory_comes_back_after_a_kill(launcher: Callable[..., Engine]) -> None:
    before = engine_free(launcher)
    engine = launcher()
    assert engine.gpus()[0].free_bytes < before
    processes.signal_session(engine.process, signal.SIGKILL)
    engine.until(lambda: engine.gpus()[0].free_bytes >= before - MIB, "the card shows its memory free again")


def engine_free(launcher: Callable[..., Engine]) -> int:
    probe = launcher("--no-such-argument", wait=False)
    probe.child.wait(probe.patience_s)
    return probe.gpus()[0].free_bytes


def _happens(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether it happens in this time: for asserting that it does not."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _ask_into(engine: Engine, answers: list[Any], prompt: str) -> None:
    answers.append(engine.complete(prompt, tokens=2, timeout=60))


def _reserve(engine: Engine) -> None:
    """A request of several pages: when it ends, some of them stay reserved."""
    engine.complete(LONG_PROMPT)
    engine.until(lambda: engine.segment().used_bytes == BUNDLE and engine.segment().prealloc_bytes > 0, "pages given back and reserved")


def _limit(engine: Engine, limit_bytes: int) -> dict[str, Any]:
    """As the daemon does it: the segment, then the RPC, until the engine's watcher has seen the segment too."""
    kvcached.write_limit(engine.launch.ipc_name, limit_bytes)
    while not (answer := engine.rpc("kv_limit", limit_bytes, time.time_ns()))["settled"]:
        time.sleep(0.02)
    return answer


def _restore(engine: Engine) -> None:
    _limit(engine, CEILING)
