"""Model folders: what config.json and the safetensors headers say, without reading a weight. Hub ids are looked up in the local cache.

Config formulas are those of dense decoder models (Llama, Qwen, Mistral); where safetensors files are there, their headers'
sizes are used instead.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

from orchestrator.policy.footprint import Shape
from orchestrator.policy.model import ModelSpec

HEADER_LIMIT = 100 * 1024 * 1024  # the format's own bound


class Sources:
    def __init__(self, environ: dict[str, str]) -> None:
        home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface")
        self._hub = Path(environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))

    def problem(self, spec: ModelSpec) -> str | None:
        if why := _unusable(spec.source, "model", "config.json"):
            return why
        found = ((name, _unusable(source, "adapter", "adapter_config.json")) for name, source in spec.adapters.items())
        return next((f"its adapter {name!r}: {why}" for name, why in found if why), None)

    def shape(self, spec: ModelSpec) -> Shape | None:
        """None where nothing can be read, or nothing can be understood."""
        folder = self._folder(spec.source)
        if folder is None:
            return None
        try:
            config = json.loads((folder / "config.json").read_text())
            config = config.get("text_config", config)
            return _shape(config, _safetensors_bytes(folder))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error):
            return None  # files of others: cut short, of another kind, or made to confuse

    def _folder(self, source: str) -> Path | None:
        if _is_path(source):
            return Path(source)
        snapshots = self._hub / f"models--{source.replace('/', '--')}" / "snapshots"
        try:
            return max(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
        except OSError:
            return None


def _unusable(source: str, what: str, file: str) -> str | None:
    """Why this folder is none of a model, or of an adapter. Hub ids are left to vLLM."""
    if not _is_path(source):
        return None
    folder = Path(source)
    if not folder.is_absolute():
        return f"{source!r} is a relative path, and the daemon has no folder of yours: write the absolute path"
    try:
        if not folder.exists():
            return f"there is no folder {source!r}"
        if not folder.is_dir():
            return f"{source!r} is a file: name the {what}'s folder"
        if not (folder / file).is_file():
            return f"{source!r} is no {what} folder: it has no {file}"
    except PermissionError as error:
        return f"the daemon's user may not read it: {error}"
    except OSError as error:
        return f"{source[:200]!r} can not be read: {error.strerror}"
    return None


def _is_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~"))


def _shape(config: dict[str, Any], weights_bytes: int | None) -> Shape:
    hidden, layers, heads = int(config["hidden_size"]), int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    if min(hidden, layers, heads, kv_heads, head_dim) < 1:
        raise ValueError("no geometry of a model")
    longest = config.get("max_position_embeddings")
    attention = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    mlp = 3 * hidden * int(config["intermediate_size"])
    embedding = int(config["vocab_size"]) * hidden * (1 if config.get("tie_word_embeddings") else 2)
    width = 4 if "32" in str(config.get("torch_dtype") or config.get("dtype") or "bfloat16") else 2
    return Shape(
        weights_bytes=weights_bytes or width * (embedding + layers * (attention + mlp)),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=None if longest is None else int(longest),
        weights_from="safetensors" if weights_bytes else "config.json",
    )


def _safetensors_bytes(folder: Path) -> int | None:
    """The sum of all tensors' bytes over the folder's *.safetensors, from their headers (8 bytes of length, then JSON)."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"{path}: not a safetensors file")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                total += end - begin
    return total or None
