"""What an engine is started with, what it inherits and what never, what its log shows, and what its API is asked.

The log lines are vLLM 0.24.0's and kvcached 0.1.6's own.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from orchestrator.drivers.vllm import PHASES, EngineApi, EngineVenv, command, environment, phase_in
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec

VENV = EngineVenv(
    kind="vllm",
    python=Path("/opt/engine/bin/python"),
    env={"HF_HOME": "/hub", "KVCACHED_MIN_RESERVED_PAGES": "3"},
    args=("--enforce-eager",),
)


def launch(**fields: object) -> Launch:
    spec = ModelSpec.model_validate({"name": "a", "source": "/models/a", **fields})
    return Launch("0123abcd", "orch-a-0123abcd", spec, ("GPU-aaa", "GPU-bbb"), 1, 2, 3 * 2**30)


def flags(argv: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in argv[2:]:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def test_the_command_line() -> None:
    argv = command(launch(aliases=["x", "y"], tensor_parallel_size=2, args=["--max-model-len", "8k"]), VENV, Path("/run/e/api.sock"))
    assert argv[0] == "/opt/engine/bin/python"
    assert argv[1].endswith("orchestrator/engine/vllm/serve.py")
    assert Path(argv[1]).is_file()
    assert flags(argv) == {
        "--model": ["/models/a"],
        "--uds": ["/run/e/api.sock"],
        "--served-model-name": ["a", "x", "y"],
        "--tensor-parallel-size": ["2"],
        "--kv-cache-memory-bytes": [str(3 * 2**30)],
        "--enable-sleep-mode": [],
        "--enforce-eager": [],
        "--max-model-len": ["8k"],
    }
    assert argv[-2:] == ["--max-model-len", "8k"]  # the model's own come last: they win over its venv's


def test_adapters_are_loaded_with_their_model() -> None:
    given = flags(command(launch(adapters={"sql": "/adapters/sql", "fr": "org/fr=1"}), VENV, Path("/s")))
    assert (given["--enable-lora"], given["--lora-modules"]) == ([], ["sql=/adapters/sql", "fr=org/fr=1"])
    assert "--enable-lora" not in command(launch(), VENV, Path("/s"))


def test_the_simulated_engine_takes_the_same_words() -> None:
    argv = command(launch(), EngineVenv(kind="simulated", python=Path("/elsewhere/python")), Path("/run/e/api.sock"))
    assert argv[:3] == [sys.executable, "-m", "orchestrator.engine.simulator"]
    assert argv[3:] == command(launch(), EngineVenv(kind="vllm"), Path("/run/e/api.sock"))[2:]


FORBIDDEN = {
    "VLLM_PORT": "1234", "VLLM_HOST_IP": "1.2.3.4", "VLLM_API_KEY": "k", "PYTHONPATH": "/evil", "PYTHONHOME": "/evil",
    "PYTHONSTARTUP": "/x", "PROMETHEUS_MULTIPROC_DIR": "/tmp/p", "CUDA_VISIBLE_DEVICES": "7", "KVCACHED_IPC_NAME": "theirs",
    "KVCACHED_PAGE_SIZE_MB": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
    "LD_PRELOAD": "/evil.so", "ORCH_ADMIN__KEY": "secret", "OPENAI_API_KEY": "secret", "NOTIFY_SOCKET": "/run/systemd/notify",
    "WATCHDOG_USEC": "1", "LISTEN_FDS": "3", "VIRTUAL_ENV": "/daemon", "XPATH": "x", "PATHS": "x", "HOMEBREW": "x",
}  # fmt: skip
ALLOWED = {
    "PATH": "/usr/bin", "HOME": "/home/o", "USER": "o", "LANG": "C.UTF-8", "LC_ALL": "C", "TZ": "UTC", "TMPDIR": "/var/tmp",
    "LD_LIBRARY_PATH": "/cuda/lib", "NVIDIA_VISIBLE_DEVICES": "all", "NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_x",
    "HUGGING_FACE_HUB_TOKEN": "x",
    "https_proxy": "http://p", "HTTP_PROXY": "http://p", "NO_PROXY": "localhost", "SSL_CERT_FILE": "/c", "SIM_LOAD_S": "0",
}  # fmt: skip


def test_an_engine_inherits_what_it_needs_and_nothing_else() -> None:
    env = environment(launch(), EngineVenv(kind="vllm", python=Path("/opt/engine/bin/python")), Path("/run/e"), FORBIDDEN | ALLOWED)
    for key, value in FORBIDDEN.items():
        assert env.get(key) != value, key
    for key, value in ALLOWED.items():
        assert env[key] == (f"/opt/engine/bin:{value}" if key == "PATH" else value), key
    assert "VLLM_PORT" not in env
    assert "PYTHONPATH" not in env
    assert "PROMETHEUS_MULTIPROC_DIR" not in env
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-aaa,GPU-bbb"  # by UUID: indices move
    assert env["KVCACHED_IPC_NAME"] == "orch-a-0123abcd"


def test_what_every_engine_is_given() -> None:
    env = environment(launch(), EngineVenv(), Path("/run/e"), {})
    assert env["ENABLE_KVCACHED"] == "true"
    assert env["KVCACHED_AUTOPATCH"] == "1"
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert env["VLLM_RPC_BASE_PATH"] == "/run/e"
    assert env["PATH"].endswith(":/usr/bin:/bin")


def test_the_venv_overrides_what_is_inherited_and_the_model_the_venv() -> None:
    env = environment(launch(env={"HF_HOME": "/mine"}), VENV, Path("/run/e"), {"HF_HOME": "/theirs"})
    assert env["HF_HOME"] == "/mine"
    assert environment(launch(), VENV, Path("/run/e"), {"HF_HOME": "/theirs"})["HF_HOME"] == "/hub"
    assert env["KVCACHED_MIN_RESERVED_PAGES"] == "3"
    tuned = environment(launch(env={"KVCACHED_MIN_RESERVED_PAGES": "7"}), VENV, Path("/run/e"), {})
    assert tuned["KVCACHED_MIN_RESERVED_PAGES"] == "7"


def test_a_venv_cannot_take_what_belongs_to_the_daemon() -> None:
    venv = EngineVenv(env={"CUDA_VISIBLE_DEVICES": "0", "KVCACHED_IPC_NAME": "shared", "VLLM_SERVER_DEV_MODE": "0"})
    env = environment(launch(), venv, Path("/run/e"), {})
    assert [env[key] for key in venv.env] == ["GPU-aaa,GPU-bbb", "orch-a-0123abcd", "1"]


LOG = [
    ("INFO 11-21 10:00:01 [api_utils.py:339] vLLM server version 0.24.0, serving model /models/a", None),
    ("(APIServer pid=1) INFO 11-21 10:00:01 [api_utils.py:273] non-default args: {'model': '/models/a'}", "importing"),
    ("[kvcached][INFO][2026-11-21 10:00:02][patch_base.py:178] Successfully patched vllm: elastic_block_pool, engine_core", "importing"),
    ("(EngineCore pid=2) INFO [core.py:113] Initializing a V1 LLM engine (v0.24.0) with config: model='/models/a'", "importing"),
    ("(EngineCore pid=2) INFO 11-21 10:00:09 [gpu_model_runner.py:5160] Starting to load model /models/a...", "loading weights"),
    ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  1.86it/s]", "loading weights"),
    ("(EngineCore pid=2) INFO 11-21 10:00:11 [default_loader.py:430] Loading weights took 1.02 seconds", "profiling memory"),
    ("(EngineCore pid=2) INFO [gpu_model_runner.py:5255] Model loading took 0.93 GiB memory and 1.5 seconds", "profiling memory"),
    ("(EngineCore pid=2) INFO 11-21 10:00:15 [gpu_worker.py:508] Available KV cache memory: 20.00 GiB", "making the KV cache"),
    ("(EngineCore pid=2) INFO 11-21 10:00:15 [kv_cache_utils.py:2146] GPU KV cache size: 1,747,616 tokens", "making the KV cache"),
    ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|###| 35/35 [00:01<00:00, 20.43it/s]", "making the KV cache"),
    ("Init C++ PageAllocator: num_layers=24, mem_size_per_layer=426MB, total_mem_size=20448MB, page_size=2MB", "warming up"),
    ("(EngineCore pid=2) INFO [core.py:306] init engine (profile, create kv cache, warmup model) took 6.1 seconds", "warming up"),
    ("(APIServer pid=1) INFO 11-21 10:00:18 [api_server.py:567] Starting vLLM server on unix:/run/e/api.sock", "warming up"),
    ("INFO:     Application startup complete.", "warming up"),
    ('INFO:     127.0.0.1:0 - "POST /v1/completions HTTP/1.1" 200 OK', None),
    ("", None),
]


def test_phases_are_read_off_the_log_and_never_go_back() -> None:
    seen = []
    for line, phase in LOG:
        assert phase_in(line) == phase, line
        if phase is not None:
            seen.append(PHASES.index(phase))
    assert seen == sorted(seen)


# ---- the API --------------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that answers what a test says, by path; anything else is a 404."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, tuple[int, object]] = {}
        self.asked: list[tuple[str, object]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next((int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:")), 0)
        body = json.loads(await reader.readexactly(length)) if length else None
        path = head.split()[1]
        self.asked.append((path, body))
        status, answer = self.answers.get(path, (404, {"error": {"message": "no"}}))
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[tuple[Scripted, EngineApi]]:
    scripted = Scripted(tmp_path / "e.sock")
    server = await asyncio.start_unix_server(scripted.serve, str(scripted.path))
    api = EngineApi(scripted.path)
    try:
        yield scripted, api
    finally:
        await api.close()
        server.close()
        await server.wait_closed()


@pytest.mark.asyncio
async def test_healthy_means_200_and_nothing_else(engine: tuple[Scripted, EngineApi], tmp_path: Path) -> None:
    scripted, api = engine
    assert not await api.healthy()
    for status, healthy in ((200, True), (503, False), (500, False)):
        scripted.answers["/health"] = (status, "")
        assert await api.healthy() is healthy
    nobody = EngineApi(tmp_path / "nobody.sock")
    assert not await nobody.healthy()
    await nobody.close()


@pytest.mark.asyncio
async def test_an_rpc_sends_its_arguments_as_text_and_gives_the_one_result(engine: tuple[Scripted, EngineApi]) -> None:
    scripted, api = engine
    scripted.answers["/collective_rpc"] = (200, {"results": [{"status": "applied"}]})
    assert await api.rpc("kv_limit", 10, 7) == {"status": "applied"}
    assert scripted.asked == [("/collective_rpc", {"method": "kv_limit", "args": ["10", "7"]})]
    scripted.answers["/collective_rpc"] = (500, {"error": "no such method"})
    with pytest.raises(httpx2.HTTPError):
        await api.rpc("kv_limit", 10, 8)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ({"/v1/completions": 200}, ["/v1/completions"]),
        ({"/v1/embeddings": 200}, ["/v1/completions", "/v1/embeddings"]),
        ({"/tokenize": 200}, ["/v1/completions", "/v1/embeddings", "/tokenize"]),
    ],
)
async def test_the_probe_asks_for_what_the_model_can(engine: tuple[Scripted, EngineApi], answers: dict[str, int], asked: list[str]) -> None:
    scripted, api = engine
    scripted.answers = {path: (status, {}) for path, status in answers.items()}
    await api.probe("a")
    assert [path for path, _ in scripted.asked] == asked
    assert all(isinstance(body, dict) and body["model"] == "a" for _, body in scripted.asked)


@pytest.mark.asyncio
@pytest.mark.parametrize("answers", [{}, {"/v1/completions": 500}, {"/v1/completions": 400}])
async def test_a_probe_that_fails_fails(engine: tuple[Scripted, EngineApi], answers: dict[str, int]) -> None:
    scripted, api = engine
    scripted.answers = {path: (status, {}) for path, status in answers.items()}
    with pytest.raises(httpx2.HTTPError):
        await api.probe("a")
