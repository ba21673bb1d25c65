"""The command line of `vllm` 0.24's API server: what the simulator heeds, and what it takes and ignores.

A flag that vLLM does not have is an argparse error, exit 2, as there: a daemon's misspelt flag must fail here too.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_IGNORED_VALUES = (
    "--max-num-batched-tokens", "--load-format", "--dtype", "--seed", "--quantization", "--scheduling-policy",
    "--worker-extension-cls", "--max-lora-rank", "--max-loras", "--chat-template", "--tokenizer", "--tokenizer-mode",
    "--revision", "--download-dir", "--generation-config", "--reasoning-parser", "--tool-call-parser", "--runner",
    "--task", "--convert", "--kv-cache-dtype", "--swap-space", "--cpu-offload-gb", "--hf-overrides", "--hf-token",
    "--limit-mm-per-prompt", "--override-generation-config", "--compilation-config", "--uvicorn-log-level",
    "--log-level", "--distributed-executor-backend", "--pipeline-parallel-size", "--data-parallel-size",
    "--model-impl", "--config-format", "--root-path", "--chat-template-content-format", "--attention-backend",
    "--speculative-config", "--max-log-len", "--allowed-origins", "--response-role", "--api-server-count",
)  # fmt: skip
_IGNORED_SWITCHES = (
    "--enforce-eager", "--trust-remote-code", "--disable-log-stats", "--enable-auto-tool-choice",
    "--enable-chunked-prefill", "--enable-log-requests", "--disable-fastapi-docs", "--async-scheduling",
    "--enable-prompt-tokens-details", "--enable-request-id-headers", "--enable-server-load-tracking",
    "--disable-cascade-attn", "--disable-custom-all-reduce", "--enable-expert-parallel", "--language-model-only",
)  # fmt: skip


@dataclass(frozen=True)
class EngineArgs:
    """The flags that change what the simulator does."""

    model: str
    served_names: list[str]
    uds: str | None
    host: str
    port: int
    kv_cache_memory_bytes: int | None
    gpu_memory_utilization: float
    max_model_len: int | None
    max_num_seqs: int
    tensor_parallel_size: int
    block_size: int
    enable_sleep_mode: bool
    enable_prefix_caching: bool
    shutdown_timeout_s: float
    api_key: str | None
    access_log: bool
    non_default: dict[str, Any]


def human_int(text: str) -> int:
    """`8192`, `8k` (8000), `8K` (8192), `25.6k`, and `auto` for -1, as vLLM reads lengths and sizes."""
    if text == "auto":
        return -1
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"Invalid integer value: {text!r}")
    number, unit = match.groups()
    if unit in _BINARY and "." in number:
        raise argparse.ArgumentTypeError(f"Decimals are not allowed with binary suffixes like {unit}: {text!r}")
    return int(float(number) * (_DECIMAL | _BINARY).get(unit, 1))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="api_server.py", description="vLLM OpenAI-Compatible RESTful API server.")
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--enable-lora", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--lora-modules", nargs="+", default=[])
    parser.add_argument("--uds")
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--kv-cache-memory-bytes", type=human_int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--max-model-len", type=human_int)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--enable-sleep-mode", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--api-key")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--optimization-level", "-O")
    for flag in _IGNORED_VALUES:
        parser.add_argument(flag)
    for flag in _IGNORED_SWITCHES:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
    return parser


def parse_args(argv: list[str]) -> EngineArgs:
    parser = build_parser()
    if argv[:1] == ["serve"]:  # `vllm serve MODEL` and the API server's module take the same flags.
        argv = argv[1:]
    argv = [_dashed(arg) for arg in argv]
    parsed = parser.parse_args(argv)
    model = parsed.model_tag or parsed.model
    names = parsed.served_model_name or [model]
    if parsed.lora_modules and not parsed.enable_lora:
        parser.error("--lora-modules needs --enable-lora")
    names = [*names, *(module.partition("=")[0] for module in parsed.lora_modules)]
    changed = {key: value for key, value in vars(parsed).items() if value != parser.get_default(key)}
    return EngineArgs(
        model=model,
        served_names=names,
        uds=parsed.uds,
        host=parsed.host,
        port=parsed.port,
        kv_cache_memory_bytes=parsed.kv_cache_memory_bytes,
        gpu_memory_utilization=parsed.gpu_memory_utilization,
        max_model_len=parsed.max_model_len,
        max_num_seqs=parsed.max_num_seqs,
        tensor_parallel_size=parsed.tensor_parallel_size,
        block_size=parsed.block_size,
        enable_sleep_mode=parsed.enable_sleep_mode,
        enable_prefix_caching=parsed.enable_prefix_caching,
        shutdown_timeout_s=parsed.shutdown_timeout,
        api_key=parsed.api_key,
        access_log=not parsed.disable_uvicorn_access_log,
        non_default=changed,
    )


def _dashed(arg: str) -> str:
    """`--served_model_name` is `--served-model-name` to vLLM's parser."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value
