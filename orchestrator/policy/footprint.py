"""How much memory and time one engine needs, per GPU, before it has ever run: an estimate with its parts; afterwards: what was learned.

The constants were measured on an H200 with vLLM 0.24.0 + kvcached 0.1.6 (0.5B, 1.5B and 7B, bf16): context and workspaces
about 1.0 GiB, profiling leaves about 2 GiB in PyTorch's cache for every size until it is emptied; asleep 1.2 to 2.0 GiB, awake again
after 0.03 to 0.33 s. Each engine's first sleep pins host memory for its weights and takes 0.7 to 20 s, its later ones 0.3 s.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import GIB, MIB

PAGE_BYTES = 2 * MIB  # KVCACHED_PAGE_SIZE_MB's default; a bundle is one page for K and one for V of every layer
BLOCK_TOKENS = 16  # vLLM's default block size
CONTEXT_BYTES = 1 * GIB
NCCL_BYTES = 1 * GIB  # a rank of a tensor-parallel engine, communication buffers and a second context included
PROFILE_BYTES = int(2.2 * GIB)
GRAPH_BYTES = int(1.5 * GIB)
FALLBACK_FLOOR_BYTES = 1 * GIB  # where the shape is unknown
FLOOR_TOKENS = 8192  # of the default floor; a larger request raises its model's floor while it is there
FIRST_SLEEP_S_PER_GIB = 17 / 14.2  # of weights, pinned by an engine's first sleep at level 1: 17 s for a 7B (H200)
SECONDS = ("start_s", "sleep_s", "sleep_again_s", "wake_s")
LEARNED = (*SECONDS, "start_bytes", "ready_bytes", "asleep_bytes", "host_bytes")
FLOOR_MARGIN_BUNDLES = 2  # kvcached pins one bundle for its null block, and retires pages late


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model folder says of itself: whole-model bytes, and the geometry of its KV."""

    weights_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    max_position: int | None
    weights_from: str = "config.json"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per GPU, KV not counted. `known` is False where nothing could be read: then nothing is refused for its size.

    start_bytes: at most while it starts. ready_bytes, asleep_bytes: then. host_bytes: of host memory, in all, while it sleeps.
    sleep_s: an engine's first sleep, which pins that host memory; sleep_again_s: later ones of the same engine.
    """

    source: str  # "estimated", "learned" or "unknown"
    parts: Mapping[str, int] = field(default_factory=dict)
    start_bytes: int = 0
    ready_bytes: int = 0
    start_s: float | None = None
    bundle_bytes: int = 0
    kv_token_bytes: int = 0
    max_model_len: int = 0
    asleep_bytes: int = CONTEXT_BYTES + CONTEXT_BYTES // 2
    host_bytes: int = 0
    sleep_s: float = 1.0
    sleep_again_s: float = 1.0
    wake_s: float = 1.0

    @property
    def known(self) -> bool:
        return self.source != "unknown"

    def learned(self, figures: Mapping[str, float]) -> "Footprint":
        """With what was seen; the rest stays as it was estimated. `figures`: fields of this class, by name."""
        seen: dict[str, Any] = {name: value if name in SECONDS else int(value) for name, value in figures.items() if name in LEARNED}
        if "start_bytes" in seen and "ready_bytes" in seen:
            profiling = max(0, int(seen["start_bytes"]) - int(seen["ready_bytes"]))
            seen |= {"source": "learned", "parts": {"learned": seen["ready_bytes"], "profiling, until ready": profiling}}
        return replace(self, **seen)


def parse_tokens(text: str | None) -> int | None:
    """vLLM's way to write a length: 8192, 8k (thousand), 8K (1024). None where it is absent or automatic."""
    if not text:
        return None
    factor = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(text[-1], 1)
    digits = text[:-1] if factor > 1 else text
    try:
        tokens = int(float(digits) * factor)
    except (ValueError, OverflowError):  # "inf" is a number to float(), and none to int()
        return None
    return tokens if tokens > 0 else None


def estimate(spec: ModelSpec, shape: Shape | None) -> Footprint:
    tp = spec.tensor_parallel_size
    parts = {"context": CONTEXT_BYTES, "activations": PROFILE_BYTES}
    if tp > 1:
        parts["communication"] = NCCL_BYTES
    if spec.flag("--enforce-eager") is None:
        parts["graphs"] = GRAPH_BYTES
    if shape is None:
        start = sum(parts.values())
        return Footprint("unknown", parts, start, start - PROFILE_BYTES)
    parts = {"weights": shape.weights_bytes // tp} | parts
    heads = max(1, shape.kv_heads // tp)  # KV heads are replicated where there are fewer than ranks
    start = sum(parts.values())
    return Footprint(
        source="estimated",
        parts=parts,
        start_bytes=start,
        ready_bytes=start - PROFILE_BYTES,
        host_bytes=shape.weights_bytes
        if spec.sleep_level == 1
        else 0,  # the least; PyTorch pins in powers of two: 26.8 GiB for 14.2 GiB of weights (H200, 7B)
        sleep_s=max(1.0, FIRST_SLEEP_S_PER_GIB * shape.weights_bytes / GIB) if spec.sleep_level == 1 else 1.0,
        bundle_bytes=PAGE_BYTES * shape.layers * 2,
        kv_token_bytes=shape.layers * 2 * heads * shape.head_dim * 2,
        max_model_len=parse_tokens(spec.flag("--max-model-len")) or shape.max_position or 0,
    )


def floor_bytes(spec: ModelSpec, footprint: Footprint) -> int:
    """The KV memory per GPU that one request of usual length needs. An engine under what its request needs can stall for ever,
    with its health check still green."""
    bundle = footprint.bundle_bytes
    if spec.kv_floor is not None:
        return max(spec.kv_floor, FLOOR_MARGIN_BUNDLES * bundle)
    if not bundle or not footprint.max_model_len:
        return FALLBACK_FLOOR_BYTES
    return live_bytes(footprint, FLOOR_TOKENS)


def live_bytes(footprint: Footprint, tokens: int) -> int:
    """What the limit must be for one request of so many tokens to run to its end. 0 where the shape is not known."""
    if not footprint.bundle_bytes or not footprint.kv_token_bytes or tokens <= 0:
        return 0
    longest = footprint.max_model_len or tokens
    return request_bytes(footprint, min(tokens, longest)) + FLOOR_MARGIN_BUNDLES * footprint.bundle_bytes


def fitting_tokens(footprint: Footprint, limit_bytes: int) -> int | None:
    """The inverse: the longest request that a limit lets run to its end. None: all of them."""
    if not footprint.max_model_len or limit_bytes >= live_bytes(footprint, footprint.max_model_len):
        return None
    room = limit_bytes - FLOOR_MARGIN_BUNDLES * footprint.bundle_bytes
    return max(0, room // footprint.kv_token_bytes - BLOCK_TOKENS)


def request_bytes(footprint: Footprint, tokens: int) -> int:
    """KV bytes per GPU, in whole bundles, of one request of so many tokens."""
    blocks = math.ceil(tokens / BLOCK_TOKENS) + 1
    return math.ceil(blocks * BLOCK_TOKENS * footprint.kv_token_bytes / footprint.bundle_bytes) * footprint.bundle_bytes
