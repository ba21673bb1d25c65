"""What a launch server imports for vLLM, and what those imports froze: set anew in each forked engine, after its environment was.

Frozen and not mended here, so that an engine which wants it otherwise is not forked (LATE in the daemon's drivers/launch_server.py):
what kvcached's C++ part reads when it is loaded (KVCACHED_MIN_/MAX_RESERVED_PAGES, KVCACHED_GPU_UTILIZATION), constants of vLLM, torch
and huggingface_hub. Checked with vLLM 0.24.0 + kvcached 0.1.6.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

CUDA_ERROR_NOT_INITIALIZED = 3
NEEDED = (
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "kvcached.kv_cache_manager",
    "uvloop",
)
# Whatever of these can be imported: they come with some versions, and some models need them.
USUAL = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.model_executor.model_loader",
    "vllm.compilation.passes.fusion.allreduce_rms_fusion",
    "vllm.device_allocator.cumem",
    "vllm.distributed.device_communicators.custom_all_reduce",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm",
    "vllm.model_executor.warmup.minimax_m3_msa_warmup",
    "vllm.renderers.hf",
    "vllm.transformers_utils.chat_templates.registry",
    "vllm.triton_utils.jit_monitor",
    "vllm.v1.attention.backends.flex_attention",
    "vllm.v1.attention.backends.turboquant_attn",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.spec_decode.dynamic.utils",
    "kvcached.integration.vllm.interfaces",
    "kvcached.observability",
    "kvcached.pool_registry",
    "triton.compiler.code_generator",
    "triton.experimental.gluon.nvidia",
    *(f"vllm.model_executor.models.{name}" for name in ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral", "gemma3", "phi3")),
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.audioflamingo3",
    "tokenizers",
)
REHEARSAL_S = 60.0  # 1 s, unless it hangs


def load() -> dict[str, str]:
    """Import it all; the versions. Raises what an import raises, and RuntimeError where one touched the GPU: a fork could not use it."""
    for name in NEEDED:
        importlib.import_module(name)
    for name in USUAL:
        _try(f"not preloaded: {name}", importlib.import_module, name)
    for name in _imported_late():
        _try(f"not preloaded: {name}", importlib.import_module, name)
    _ask_ahead()
    import torch

    if torch.cuda.is_initialized() or not _forks_may_use_the_gpu():
        raise RuntimeError("CUDA was initialised while vLLM was imported: a process forked from here could not use it")
    return {name: importlib.metadata.version(name) for name in ("vllm", "kvcached", "torch")}


def _ask_ahead() -> None:
    """Answers that are remembered, the same in each engine, and 0.4 s of its start: to look into its cache Triton hashes all of itself."""
    for module, name in (("triton.runtime.cache", "triton_key"), ("triton.backends.nvidia.driver", "library_dirs"), ("serve", "parser")):
        _try(f"not asked ahead: {module}.{name}", _ask, module, name)
    _try("not asked ahead: the version of ptxas", _ptxas_version)


def _ptxas_version() -> None:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    if capability is not None:
        _ask("triton.backends.nvidia.compiler", "get_ptxas_version", capability.major * 10 + capability.minor)


def _ask(module: str, name: str, *arguments: Any) -> None:
    getattr(importlib.import_module(module), name)(*arguments)


def _try(what: str, do: Callable[..., Any], *arguments: Any) -> None:
    try:
        do(*arguments)
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {error}", flush=True)


def _imported_late() -> list[str]:
    """What a start imports besides, as seen in a fork that rehearses one: its web server's parts, which are 0.3 s of each start."""
    hears, tells = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(REHEARSAL_S))
            before = set(sys.modules)
            importlib.import_module("serve").rehearse()
            late = [name for name in sys.modules if name not in before]
            os.write(tells, json.dumps(late).encode())
        except BaseException as error:
            print(f"a start could not be rehearsed: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(0)
    os.close(tells)
    with open(hears, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return list(json.loads(said)) if said else []


def _forks_may_use_the_gpu() -> bool:
    """Asked of a fork: cuInit answers 3 there if it was ever called here, by whatever library (seen on an H200; NVML does no harm)."""
    child = os.fork()
    if child == 0:
        answer = 0
        try:
            answer = ctypes.CDLL("libcuda.so.1").cuInit(0)
        finally:
            os._exit(answer == CUDA_ERROR_NOT_INITIALIZED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refresh() -> None:
    """In a forked engine, before anything of vLLM runs."""
    _kvcached_settings()
    _answers_about_gpus()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # torch's generator begins with the same fixed seed in every process; Python's own is seeded by the fork
    main = sys.modules["__main__"]
    main.__file__ = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serve.py")  # what a process spawned by vLLM runs first


def _kvcached_settings() -> None:
    """kvcached.utils turns KVCACHED_* into constants when it is imported, and others import those by name, or keep them under an alias."""
    import kvcached.utils

    fresh = runpy.run_path(kvcached.utils.__file__)
    for name, old in vars(kvcached.utils).copy().items():
        if name.isupper() and isinstance(old, (bool, int, float, str)) and fresh[name] != old:
            for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "kvcached"]:
                for alias in (name, f"_{name.lower()}"):
                    if alias in vars(module):
                        setattr(module, alias, fresh[name])
    if workers := sys.modules.get("kvcached.tp_ipc_util"):  # else all forked engines have one folder of sockets, and the last one's workers
        vars(workers)["SOCKET_DIR"] = kvcached.utils.get_tp_socket_dir()
    kvcached.utils.get_kvcached_logger().setLevel(kvcached.utils.get_log_level())


def _answers_about_gpus() -> None:
    """vLLM remembers what NVML says of device 0, and which one that is depends on CUDA_VISIBLE_DEVICES."""
    from vllm.platforms import current_platform

    for kind in type(current_platform).__mro__:
        for value in vars(kind).values():
            forget = getattr(getattr(value, "__func__", value), "cache_clear", None)
            if forget is not None:
                forget()
