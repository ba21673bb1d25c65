"""vLLM: the command line and environment of an engine, the phases in its log, and its HTTP API for control (not for traffic).

Figures and flags were checked with vLLM 0.24.0 + kvcached 0.1.6.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from orchestrator.policy.instance import Launch
from orchestrator.policy.model import TUNABLE_ENV

SERVE = Path(__file__).parent.parent / "engine/vllm/serve.py"
LAUNCH_SERVER = SERVE.with_name("launch_server.py")
SIMULATOR = "orchestrator.engine.simulator"
SLEEP_TIMEOUT_S = 300.0
HANG_S = 20.0

# What an engine may inherit. Not here: VLLM_* and KVCACHED_* (a stray VLLM_PORT breaks a start), PYTHON*, MASTER_*, RANK*,
# PROMETHEUS_MULTIPROC_DIR (engines would mix their metrics), CUDA_VISIBLE_DEVICES.
INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|LIBRARY_PATH|CUDA_HOME|CUDA_PATH|NVIDIA_\w+|NCCL_\w+|HF_\w+|HUGGING\w+"
    r"|XDG_CACHE_HOME|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR|(?i:https?_proxy|no_proxy|all_proxy)|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|SIM_\w+"
)

PHASES = ("spawning", "importing", "loading weights", "profiling memory", "making the KV cache", "warming up", "probing", "ready")
_PHASE_LINES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("Application startup complete|Starting vLLM server|Route: "), "warming up"),
    (re.compile("Init C\\+\\+ PageAllocator|init engine \\(profile"), "warming up"),
    (re.compile("Available KV cache memory|GPU KV cache size|Capturing CUDA graph"), "making the KV cache"),
    (re.compile("Model loading took|Loading weights took"), "profiling memory"),
    (re.compile("Starting to load model|Loading safetensors"), "loading weights"),
    (re.compile("non-default args|Successfully patched|Initializing a V1 LLM engine"), "importing"),
)


@dataclass(frozen=True)
class EngineVenv:
    """Where an engine's Python is and what every engine of it is given."""

    kind: str = "vllm"
    python: Path = Path(sys.executable)
    env: Mapping[str, str] = field(default_factory=dict)
    args: Sequence[str] = ()
    stop_grace_s: float = 10.0
    hang_s: float | None = HANG_S  # drivers/pulse.py; None: a hang is never looked for
    launch_server: bool = False  # fork engines from a process that has imported vLLM (drivers/launch_server.py)


def command(launch: Launch, venv: EngineVenv, socket: Path) -> list[str]:
    spec = launch.spec
    program = [str(venv.python), str(SERVE)] if venv.kind == "vllm" else [sys.executable, "-m", SIMULATOR]
    return [
        *program,
        *("--model", spec.source),
        *("--uds", str(socket)),
        *("--served-model-name", spec.name, *spec.aliases),
        *("--tensor-parallel-size", str(spec.tensor_parallel_size)),
        *("--kv-cache-memory-bytes", str(launch.ceiling_bytes)),  # honoured exactly: the segment's start-up total is this
        *(["--enable-sleep-mode"] if spec.sleep_level else []),
        *(["--enable-lora", "--lora-modules", *(f"{name}={source}" for name, source in spec.adapters.items())] if spec.adapters else []),
        *venv.args,
        *spec.args,
    ]


def version(venv: EngineVenv) -> str:
    """What the venv holds, by the names of its packages' dist-info: "kvcached-0.1.6 vllm-0.24.0". Empty where that cannot be seen."""
    if venv.kind != "vllm":
        return venv.kind
    found = venv.python.parent.parent.glob("lib/python3*/site-packages/*.dist-info")
    return " ".join(sorted(path.name.removesuffix(".dist-info") for path in found if path.name.split("-")[0] in ("vllm", "kvcached")))


def launch_server_command(venv: EngineVenv, fd: int) -> list[str]:
    python = venv.python if venv.kind == "vllm" else sys.executable
    return [str(python), str(LAUNCH_SERVER), "--kind", venv.kind, "--fd", str(fd)]


# Stronger than what a config or a spec says.
_OWNED = {
    "ENABLE_KVCACHED": "true",
    "KVCACHED_AUTOPATCH": "1",
    "KVCACHED_GPU_UTILIZATION": "0.98",  # its own headroom; policy's reserve is larger, so that limits bind first
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # kvcached needs it for vLLM 0.22 to 0.27
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc; the socket is in a folder that only the daemon's user may enter
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",  # 5 s by default: shorter than our pool's, and POSTs would fail
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
_OF_A_LAUNCH = ("KVCACHED_IPC_NAME", "VLLM_RPC_BASE_PATH", "CUDA_VISIBLE_DEVICES")


def venv_environment(venv: EngineVenv, inherited: Mapping[str, str]) -> dict[str, str]:
    """What all engines of a venv have in common, and so what its launch server imports with."""
    env = {key: value for key, value in inherited.items() if INHERITED.fullmatch(key)}
    env["PATH"] = f"{venv.python.parent}:{env.get('PATH', '/usr/bin:/bin')}"  # ninja and nvcc wrappers live in the venv
    if venv.kind == "simulated":
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
    env |= {
        "KVCACHED_MIN_RESERVED_PAGES": "1",  # 5/10 by default: 384 MiB more for an idle 0.5B engine
        "KVCACHED_MAX_RESERVED_PAGES": "2",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env |= {key: value for key, value in venv.env.items() if key not in _OF_A_LAUNCH}
    return env | _OWNED


def environment(launch: Launch, venv: EngineVenv, folder: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    return {
        "KVCACHED_MAX_CACHED_TOKENS": str(launch.spec.prefix_cache_tokens),
        **venv_environment(venv, inherited),
        **launch.spec.env,
        **_OWNED,
        "KVCACHED_IPC_NAME": launch.ipc_name,
        "VLLM_RPC_BASE_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": ",".join(launch.gpus),
    }


assert all(key.startswith("KVCACHED_") for key in TUNABLE_ENV)


_TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total\{.*\} (\S+)$", re.MULTILINE)


def phase_in(line: str) -> str | None:
    """The phase that a log line shows to have been reached, or None."""
    return next((phase for pattern, phase in _PHASE_LINES if pattern.search(line)), None)


NO_ANSWER = (httpx2.HTTPError, LookupError, ValueError)  # what a call raises that got none, or one that says nothing


class EngineApi:
    """HTTP over the engine's unix socket. Every call raises httpx2.HTTPError when the engine does not answer as it should."""

    def __init__(self, socket: Path) -> None:
        # verify=False: a unix socket has no TLS, and loading the CA bundle for nothing holds the event loop up for 0.15 s
        transport = httpx2.AsyncHTTPTransport(uds=str(socket), verify=False)
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://engine", timeout=30.0)

    async def close(self) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=2.0)).status_code == 200
        except httpx2.HTTPError:
            return False

    async def names(self) -> list[str]:
        answer = await self._http.get("/v1/models")
        answer.raise_for_status()
        return [model["id"] for model in answer.json()["data"]]

    async def probe(self, name: str) -> None:
        """One token, so that "healthy" means that it computes. A model that does not generate is asked for an embedding."""
        answer = await self._http.post("/v1/completions", json={"model": name, "prompt": "1", "max_tokens": 1})
        if answer.status_code == 404:
            answer = await self._http.post("/v1/embeddings", json={"model": name, "input": "1"})
        if answer.status_code == 404:
            answer = await self._http.post("/tokenize", json={"model": name, "prompt": "1"})
        answer.raise_for_status()

    async def tokens(self) -> float | None:
        """Read and made so far, for all requests together; None where its figures are turned off (--disable-log-stats)."""
        answer = await self._http.get("/metrics")
        answer.raise_for_status()
        found = _TOKENS.findall(answer.content)
        return sum(map(float, found)) if found else None

    async def reset_prefix_cache(self) -> None:
        (await self._http.post("/reset_prefix_cache")).raise_for_status()

    async def sleep(self, level: int) -> None:
        """Returns when it sleeps: 0.3 s for 15 GB, 11 to 20 s the first time, when host memory is pinned (H200)."""
        (await self._http.post("/sleep", params={"level": level}, timeout=SLEEP_TIMEOUT_S)).raise_for_status()

    async def wake(self) -> None:
        (await self._http.post("/wake_up", timeout=SLEEP_TIMEOUT_S)).raise_for_status()

    async def sleeping(self) -> bool:
        """False too where an engine was started without sleep mode."""
        answer = await self._http.get("/is_sleeping")
        if answer.status_code == 404:
            return False
        answer.raise_for_status()
        return bool(answer.json()["is_sleeping"])

    async def rpc(self, method: str, *args: int) -> dict[str, Any]:
        """One of engine/vllm/kv_rpc.py's methods; arguments travel as strings."""
        answer = await self._http.post("/collective_rpc", json={"method": method, "args": [str(arg) for arg in args]})
        answer.raise_for_status()
        result: dict[str, Any] = answer.json()["results"][0]
        return result
