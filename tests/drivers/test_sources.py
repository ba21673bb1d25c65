"""Model folders as they lie on disks: whole, half downloaded, broken, or not there. Safetensors headers are written by hand."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers.sources import Sources
from orchestrator.policy.footprint import Shape
from orchestrator.policy.model import ModelSpec

QWEN = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
QWEN_BYTES = 2 * (151936 * 896 + 24 * (896 * 64 * (14 + 4) + 14 * 64 * 896 + 3 * 896 * 4864))


def spec(source: object) -> ModelSpec:
    return ModelSpec(name="a", source=str(source))


def folder(path: Path, config: Any = QWEN) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def tensors(path: Path, **sizes: int) -> None:
    """A safetensors file without its weights: the header alone is read."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources({"HF_HOME": str(tmp_path / "hf")})


def test_a_config_alone(sources: Sources, tmp_path: Path) -> None:
    assert sources.shape(spec(folder(tmp_path / "m"))) == Shape(QWEN_BYTES, 24, 2, 64, 32768, "config.json")
    assert 0.9 * 2**30 < QWEN_BYTES < 0.95 * 2**30  # 0.93 GiB on an H200


def test_untied_embeddings_count_twice_and_float32_too(sources: Sources, tmp_path: Path) -> None:
    untied = sources.shape(spec(folder(tmp_path / "u", QWEN | {"tie_word_embeddings": False})))
    wide = sources.shape(spec(folder(tmp_path / "w", QWEN | {"torch_dtype": "float32"})))
    assert untied is not None
    assert wide is not None
    assert untied.weights_bytes == QWEN_BYTES + 2 * 151936 * 896
    assert wide.weights_bytes == 2 * QWEN_BYTES


def test_safetensors_are_summed_over_their_files(sources: Sources, tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    tensors(path / "model-00001-of-00002.safetensors", a=1000, b=24)
    tensors(path / "model-00002-of-00002.safetensors", c=6)
    (path / "model.safetensors.index.json").write_text("{}")
    assert sources.shape(spec(path)) == Shape(1030, 24, 2, 64, 32768, "safetensors")


def test_a_multimodal_config_has_its_text_part(sources: Sources, tmp_path: Path) -> None:
    shape = sources.shape(spec(folder(tmp_path / "m", {"text_config": QWEN, "vision_config": {"hidden_size": 1}})))
    assert shape is not None
    assert (shape.layers, shape.kv_heads) == (24, 2)


def test_no_kv_heads_means_as_many_as_heads_and_head_dim_may_be_given(sources: Sources, tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN.items() if key not in ("num_key_value_heads", "max_position_embeddings")}
    shape = sources.shape(spec(folder(tmp_path / "m", config | {"head_dim": 128})))
    assert shape is not None
    assert (shape.kv_heads, shape.head_dim, shape.max_position) == (14, 128, None)


@pytest.mark.parametrize(
    "config",
    [
        "", "{", "[]", "null", "7", '"text"', "{}", '{"text_config": null}', '{"text_config": []}', "\x00", "[" * 100_000,
        QWEN | {"hidden_size": "wide"}, QWEN | {"hidden_size": None}, QWEN | {"num_attention_heads": 0}, QWEN | {"num_hidden_layers": 0},
        QWEN | {"num_hidden_layers": -4}, QWEN | {"hidden_size": float("inf")}, QWEN | {"max_position_embeddings": "long"},
        QWEN | {"max_position_embeddings": [1]}, QWEN | {"num_key_value_heads": {"a": 1}},
        {k: v for k, v in QWEN.items() if k != "vocab_size"},
    ],
)  # fmt: skip
def test_a_broken_config_is_an_unknown_shape(sources: Sources, tmp_path: Path, config: Any) -> None:
    assert sources.shape(spec(folder(tmp_path / "m", config))) is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x08", struct.pack("<Q", 1 << 40), struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 50) + b'{"a": {"data_off',
        struct.pack("<Q", 8) + b'{"a": 1}', struct.pack("<Q", 9) + b'{"a": {}}', struct.pack("<Q", 2) + b"\xff\xff",
    ],
)  # fmt: skip
def test_a_safetensors_file_that_is_cut_short_is_an_unknown_shape(sources: Sources, tmp_path: Path, data: bytes) -> None:
    """As while it is being downloaded. A daemon that ends for it would take every other model along."""
    path = folder(tmp_path / "m")
    (path / "model.safetensors").write_bytes(data)
    assert sources.shape(spec(path)) is None
    assert sources.problem(spec(path)) is None


def test_a_config_that_is_not_utf8(sources: Sources, tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / "config.json").write_bytes(b"\xff\xfe{")
    assert sources.shape(spec(path)) is None


def test_problems_of_a_path_say_what_and_the_mend(sources: Sources, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for source, text in {
        tmp_path / "nowhere": "there is no folder",
        tmp_path / "dangling": "there is no folder",
        file: "is a file: name the model's folder",
        tmp_path / "empty": "has no config.json",
        "./m": "write the absolute path",
        "../m": "write the absolute path",
        "~/m": "write the absolute path",
        "/" + "x" * 5000: "can not be read: File name too long",
        file / "m": "there is no folder",
    }.items():
        assert text in str(sources.problem(spec(source))), source
        assert sources.shape(spec(source)) is None
    assert sources.problem(spec(folder(tmp_path / "m"))) is None


def test_a_hub_id_is_looked_up_in_the_cache(sources: Sources, tmp_path: Path) -> None:
    assert sources.problem(spec("Qwen/Qwen2.5-0.5B")) is None  # not downloaded is no problem
    assert sources.shape(spec("Qwen/Qwen2.5-0.5B")) is None
    snapshots = tmp_path / "hf/hub/models--Qwen--Qwen2.5-0.5B/snapshots"
    blobs = tmp_path / "hf/hub/models--Qwen--Qwen2.5-0.5B/blobs"
    blobs.mkdir(parents=True)
    for age, (revision, layers) in enumerate({"older": 3, "newer": 24}.items()):
        blob = blobs / f"{revision}-config"
        blob.write_text(json.dumps(QWEN | {"num_hidden_layers": layers}))
        (snapshots / revision).mkdir(parents=True)
        (snapshots / revision / "config.json").symlink_to(blob)
        os.utime(snapshots / revision, (age, age))
    shape = sources.shape(spec("Qwen/Qwen2.5-0.5B"))
    assert shape is not None
    assert shape.layers == 24
    assert sources.shape(spec("Qwen/Qwen2.5-7B")) is None


@pytest.mark.parametrize(
    ("environ", "hub"),
    [
        ({"HF_HUB_CACHE": "{}/x", "HF_HOME": "/no"}, "x"),
        ({"HF_HOME": "{}/h"}, "h/hub"),
        ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ],
)
def test_where_the_cache_is(tmp_path: Path, environ: dict[str, str], hub: str) -> None:
    folder(tmp_path / hub / "models--org--m/snapshots/one")
    sources = Sources({key: value.format(tmp_path) for key, value in environ.items()})
    assert sources.shape(spec("org/m")) is not None
