"""The environment variables that the simulator heeds: vLLM's, kvcached's with their defaults, and its own `SIM_…`.

Read once, before the fork, so both processes see the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .faults import Faults

_TRUE = ("true", "1")


@dataclass(frozen=True)
class Environment:
    """See the names in `read`; `kvcached` False is plain vLLM."""

    gpu_dir: Path
    cuda_visible_devices: str | None
    memory_scale: float
    load_s: float
    step_s: float
    core_watchdog_s: float
    faults: Faults
    kvcached: bool
    ipc_name: str | None
    page_bytes: int
    gpu_utilization: float
    prealloc: bool
    min_reserved_pages: int
    max_reserved_pages: int
    max_cached_tokens: int
    dev_mode: bool
    keep_alive_s: int
    v2_runner: bool
    api_key: str | None
    keeps_responses: bool

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Environment:
        if not env.get("SIM_GPU_DIR"):
            raise ValueError("SIM_GPU_DIR is not set: name the directory that holds gpus.json")
        faults = Faults.parse(env.get("SIM_FAULT", ""))
        return cls(
            gpu_dir=Path(env["SIM_GPU_DIR"]),
            cuda_visible_devices=env.get("CUDA_VISIBLE_DEVICES"),
            memory_scale=float(env.get("SIM_MEMORY_SCALE", "1.0")),
            load_s=float(env.get("SIM_LOAD_S", "0.3")) + faults.get("slow_start", 0.0),
            step_s=float(env.get("SIM_STEP_S", "0.01")),
            core_watchdog_s=float(env.get("SIM_CORE_WATCHDOG_S", "0.5")),
            faults=faults,
            kvcached=env.get("ENABLE_KVCACHED", "false").lower() in _TRUE and "no_kvcached" not in faults,
            ipc_name=env.get("KVCACHED_IPC_NAME"),
            page_bytes=int(env.get("KVCACHED_PAGE_SIZE_MB", "2")) * 2**20,
            gpu_utilization=float(env.get("KVCACHED_GPU_UTILIZATION", "0.95")),
            prealloc=env.get("KVCACHED_PAGE_PREALLOC_ENABLED", "true").lower() in _TRUE,
            min_reserved_pages=int(env.get("KVCACHED_MIN_RESERVED_PAGES", "5")),
            max_reserved_pages=int(env.get("KVCACHED_MAX_RESERVED_PAGES", "10")),
            max_cached_tokens=int(env.get("KVCACHED_MAX_CACHED_TOKENS", "16000")),
            dev_mode=env.get("VLLM_SERVER_DEV_MODE", "0") == "1",
            keep_alive_s=int(env.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "5")),
            v2_runner=env.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0",
            api_key=env.get("VLLM_API_KEY"),
            keeps_responses=env.get("VLLM_ENABLE_RESPONSES_API_STORE", "0") == "1",
        )
