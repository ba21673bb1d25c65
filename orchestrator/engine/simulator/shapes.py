"""How large a model is: weights, and KV memory for each token, from its config.json.

A model that is no folder (a hub id) gets the Qwen2.5 shape whose size its name bears, or the smallest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BF16_BYTES = 2
_KV_BUFFERS = 2  # K and V: grouped-query attention on vLLM before 0.26


class InvalidModel(Exception):
    """The model cannot be read; the text is vLLM's."""


@dataclass(frozen=True)
class Shape:
    """The sizes that decide memory; all weights count as bf16."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    max_positions: int | None
    architecture: str

    @property
    def weights_bytes(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return (embeddings + self.layers * layer) * _BF16_BYTES

    def bundle_bytes(self, page_bytes: int) -> int:
        return page_bytes * self.layers * _KV_BUFFERS

    def tokens_per_page(self, page_bytes: int, tensor_parallel: int) -> int:
        kv_heads = max(1, self.kv_heads // tensor_parallel)
        return page_bytes // (kv_heads * self.head_dim * _BF16_BYTES)


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, *, tied: bool) -> Shape:
    head_dim = hidden // heads
    return Shape(hidden, layers, heads, kv_heads, head_dim, intermediate, 151936, tied, 32768, "Qwen2ForCausalLM")


_KNOWN = {
    "1.5b": _qwen(1536, 28, 12, 2, 8960, tied=True),
    "0.5b": _qwen(896, 24, 14, 2, 4864, tied=True),
    "7b": _qwen(3584, 28, 28, 4, 18944, tied=False),
}


def load_shape(model: str) -> Shape:
    folder = Path(model)
    if (folder / "config.json").is_file():
        return _from_config(json.loads((folder / "config.json").read_text()))
    if folder.is_absolute() or model.startswith("./") or folder.is_dir():
        raise InvalidModel(
            f"Invalid repository ID or local directory specified: '{model}'.\n"
            "Please verify the following requirements:\n"
            "1. Provide a valid Hugging Face repository ID.\n"
            "2. Specify a local directory that contains a recognized configuration file.\n"
            "   - For Hugging Face models: ensure the presence of a 'config.json'."
        )
    return next((shape for size, shape in _KNOWN.items() if size in model.lower()), _KNOWN["0.5b"])


def _from_config(config: dict[str, Any]) -> Shape:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return Shape(
        hidden_size=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config["max_position_embeddings"]) if config.get("max_position_embeddings") else None,
        architecture=str((config.get("architectures") or [""])[0]),
    )
