"""Estimates against shapes that are known: the bundles kvcached showed on the card, and floors worked out by hand."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.footprint import (
    CONTEXT_BYTES,
    FALLBACK_FLOOR_BYTES,
    GRAPH_BYTES,
    NCCL_BYTES,
    PROFILE_BYTES,
    Footprint,
    Shape,
    estimate,
    fitting_tokens,
    floor_bytes,
    live_bytes,
    parse_tokens,
    request_bytes,
)
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.units import GIB, MIB

# layers, KV heads, head size and the length in config.json of the Qwen2.5 family
QWEN_05B = Shape(int(0.93 * GIB), 24, 2, 64, 32768)
QWEN_15B = Shape(int(2.88 * GIB), 28, 2, 128, 32768)
QWEN_7B = Shape(int(14.19 * GIB), 28, 4, 128, 32768)


def spec(*args: str, **fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "source": "org/m", "args": args, **fields})


@pytest.mark.parametrize(
    ("shape", "bundle_mib", "token_bytes", "full_bundles", "floor_bundles", "floor_4k_bundles"),
    [
        # 32768 tokens and a block of 16 more: 384.2 of 96 MiB -> 5; 896.4 of 112 -> 9; 1792.9 of 112 -> 17; and two spare.
        # The default floor's 8192 tokens: 2, 3 and 5 bundles, and two spare; 4000 tokens: 1, 1 and 2.
        (QWEN_05B, 96, 12_288, 7, 4, 3),
        (QWEN_15B, 112, 28_672, 11, 5, 3),
        (QWEN_7B, 112, 57_344, 19, 7, 4),
    ],
)
def test_known_shapes(
    shape: Shape, bundle_mib: int, token_bytes: int, full_bundles: int, floor_bundles: int, floor_4k_bundles: int
) -> None:
    footprint = estimate(spec(), shape)
    assert footprint.bundle_bytes == bundle_mib * MIB
    assert footprint.kv_token_bytes == token_bytes
    assert footprint.max_model_len == 32768
    assert live_bytes(footprint, 32768) == full_bundles * bundle_mib * MIB
    assert floor_bytes(spec(), footprint) == floor_bundles * bundle_mib * MIB
    short = spec("--max-model-len", "4000")
    assert floor_bytes(short, estimate(short, shape)) == floor_4k_bundles * bundle_mib * MIB


def test_the_parts_of_an_estimate() -> None:
    footprint = estimate(spec(), QWEN_7B)
    assert dict(footprint.parts) == {
        "weights": QWEN_7B.weights_bytes,
        "context": CONTEXT_BYTES,
        "activations": PROFILE_BYTES,
        "graphs": GRAPH_BYTES,
    }
    assert footprint.start_bytes == sum(footprint.parts.values())
    assert footprint.ready_bytes == footprint.start_bytes - PROFILE_BYTES
    assert (footprint.source, footprint.known, footprint.start_s) == ("estimated", True, None)


@pytest.mark.parametrize("flag", ["--enforce-eager", "--enforce_eager"])
def test_eager_engines_have_no_graphs(flag: str) -> None:
    assert estimate(spec(), QWEN_7B).start_bytes - estimate(spec(flag), QWEN_7B).start_bytes == GRAPH_BYTES


def test_tensor_parallel_splits_weights_and_heads_but_not_bundles() -> None:
    two, four, eight = (estimate(spec(tensor_parallel_size=size), QWEN_7B) for size in (2, 4, 8))
    assert two.parts["weights"] == QWEN_7B.weights_bytes // 2
    assert two.parts["communication"] == NCCL_BYTES
    assert two.bundle_bytes == four.bundle_bytes == 112 * MIB  # a page a layer for K and for V on each rank
    assert (two.kv_token_bytes, four.kv_token_bytes) == (28_672, 14_336)
    assert eight.kv_token_bytes == four.kv_token_bytes  # 4 KV heads on 8 ranks: replicated


@pytest.mark.parametrize(
    ("args", "length"),
    [
        ((), 32768),
        (("--max-model-len", "8k"), 8000),
        (("--max_model_len=8K",), 8192),
        (("--max-model-len", "auto"), 32768),
        (("--max-model-len", "-1"), 32768),
        (("--max-model-len",), 32768),
        (("--max-model-len", "inf"), 32768),
    ],
)
def test_the_length_is_the_flag_or_the_config(args: tuple[str, ...], length: int) -> None:
    assert estimate(spec(*args), QWEN_05B).max_model_len == length


def test_an_unknown_shape_is_unknown_and_has_a_floor_all_the_same() -> None:
    footprint = estimate(spec(), None)
    assert (footprint.source, footprint.known, footprint.bundle_bytes) == ("unknown", False, 0)
    assert footprint.start_bytes == CONTEXT_BYTES + PROFILE_BYTES + GRAPH_BYTES
    assert floor_bytes(spec(), footprint) == FALLBACK_FLOOR_BYTES
    assert floor_bytes(spec(kv_floor="3GiB"), footprint) == 3 * GIB
    no_length = estimate(spec(), Shape(GIB, 24, 2, 64, None))
    assert floor_bytes(spec(), no_length) == FALLBACK_FLOOR_BYTES


def test_a_floor_of_the_operator_counts_but_never_under_two_bundles() -> None:
    footprint = estimate(spec(), QWEN_05B)
    assert floor_bytes(spec(kv_floor="4GiB"), footprint) == 4 * GIB
    assert floor_bytes(spec(kv_floor="1MiB"), footprint) == 192 * MIB
    assert floor_bytes(spec(kv_floor=0), footprint) == 192 * MIB


def test_what_was_learned_replaces_bytes_and_time_and_keeps_the_geometry() -> None:
    estimated = estimate(spec(), QWEN_7B)
    learned = estimated.learned({"start_bytes": 18 * GIB, "ready_bytes": 16 * GIB, "start_s": 4.5})
    assert (learned.source, learned.known) == ("learned", True)
    assert (learned.start_bytes, learned.ready_bytes, learned.start_s) == (18 * GIB, 16 * GIB, 4.5)
    assert dict(learned.parts) == {"learned": 16 * GIB, "profiling, until ready": 2 * GIB}
    assert floor_bytes(spec(), learned) == floor_bytes(spec(), estimated)
    assert estimated.learned({"start_bytes": 1, "ready_bytes": 2}).parts["profiling, until ready"] == 0


def test_what_its_sleep_has_shown_is_learned_beside_the_estimate() -> None:
    seen = {"asleep_bytes": GIB, "host_bytes": 15 * GIB, "sleep_s": 11.0, "sleep_again_s": 0.3, "wake_s": 0.33, "unknown": 1}
    learned = estimate(spec(), QWEN_7B).learned(seen)
    assert (learned.source, learned.asleep_bytes, learned.host_bytes) == ("estimated", GIB, 15 * GIB)
    assert (learned.sleep_s, learned.sleep_again_s, learned.wake_s) == (11.0, 0.3, 0.33)


@pytest.mark.parametrize(("shape", "level", "seconds"), [(QWEN_7B, 1, 17.0), (QWEN_15B, 1, 3.4), (QWEN_05B, 1, 1.1), (QWEN_7B, 2, 1.0)])
def test_a_first_sleep_takes_as_long_as_its_weights_are_large_unless_they_are_dropped(shape: Shape, level: int, seconds: float) -> None:
    footprint = estimate(spec(sleep_level=level), shape)
    assert footprint.sleep_s == pytest.approx(seconds, abs=0.1)
    assert footprint.sleep_again_s == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (None, None),
        ("", None),
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("1.5k", 1500),
        ("1m", 1_000_000),
        ("1M", 1_048_576),
        ("auto", None),
        ("-1", None),
        ("0", None),
        ("k", None),
        ("inf", None),
        ("-inf", None),
        ("nan", None),
        ("1e999", None),
        ("1e999k", None),
        ("8 thousand", None),
    ],
)
def test_lengths_as_vllm_writes_them(text: str | None, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=8))
def test_any_length_is_a_positive_number_or_none(text: str) -> None:
    tokens = parse_tokens(text)
    assert tokens is None or tokens > 0


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(1, 200_000), st.sampled_from((QWEN_05B, QWEN_15B, QWEN_7B)), st.sampled_from((1, 2, 4)))
def test_a_request_gets_whole_bundles_that_hold_it(tokens: int, shape: Shape, size: int) -> None:
    footprint: Footprint = estimate(spec(tensor_parallel_size=size), shape)
    needed = request_bytes(footprint, tokens)
    assert needed % footprint.bundle_bytes == 0
    assert needed >= tokens * footprint.kv_token_bytes
    assert needed < (tokens + 32) * footprint.kv_token_bytes + footprint.bundle_bytes
    assert request_bytes(footprint, tokens + 1) >= needed
    assert math.isclose(request_bytes(footprint, tokens), needed)


def test_what_a_request_needs_is_not_known_without_a_shape_and_no_longer_than_the_model() -> None:
    assert live_bytes(estimate(spec(), None), 8192) == 0
    footprint = estimate(spec(), QWEN_05B)
    assert live_bytes(footprint, 0) == 0
    assert live_bytes(footprint, 10**9) == live_bytes(footprint, 32768)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 30), st.sampled_from((QWEN_05B, QWEN_15B, QWEN_7B)))
def test_the_longest_request_that_fits_fits(bundles: int, shape: Shape) -> None:
    footprint = estimate(spec(), shape)
    limit = bundles * footprint.bundle_bytes
    tokens = fitting_tokens(footprint, limit)
    if tokens is None:
        assert live_bytes(footprint, footprint.max_model_len) <= limit
    else:
        assert tokens < footprint.max_model_len
        assert tokens == 0 or live_bytes(footprint, tokens) <= limit
