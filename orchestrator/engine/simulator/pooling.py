"""Bodies of the models that write no text: embeddings, pooling, classes, scores and ranks. The same input gives the same numbers."""

from __future__ import annotations

import base64
import struct
import uuid
from time import time
from typing import Any

from .answers import Json

LABELS = ("LABEL_0", "LABEL_1")


def embeddings(model: str, inputs: list[str], *, as_base64: bool) -> Json:
    """Sixteen numbers for each input, from its characters: the same input gives the same vector."""
    data: list[Json] = []
    for index, text in enumerate(inputs):
        vector = [float(sum(map(ord, text[i::16])) % 997) / 997 for i in range(16)]
        value: Any = base64.b64encode(struct.pack("<16f", *vector)).decode() if as_base64 else vector
        data.append({"index": index, "object": "embedding", "embedding": value})
    tokens = sum(map(len, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    identity = {"id": f"embd-{uuid.uuid4().hex}", "object": "list", "created": int(time()), "model": model}
    return identity | {"data": data, "usage": usage}


def embed(model: str, texts: list[str]) -> Json:
    """Cohere's shape, /v2/embed."""
    vectors = [_vector(text) for text in texts]
    meta = {"billed_units": {"input_tokens": sum(map(len, texts))}}
    return {"id": uuid.uuid4().hex, "embeddings": {"float": vectors}, "texts": texts, "meta": meta, "model": model}


def pooled(model: str, inputs: list[str]) -> Json:
    return _listed("pool", model, [{"index": n, "object": "pooling", "data": _vector(text)} for n, text in enumerate(inputs)], inputs)


def classes(model: str, inputs: list[str]) -> Json:
    data: list[Json] = []
    for index, text in enumerate(inputs):
        first = 0.1 + 0.8 * _vector(text)[0]
        label = LABELS[first < 0.5]
        data.append({"index": index, "label": label, "probs": [first, 1 - first], "num_classes": 2})
    return _listed("classify", model, data, inputs)


def scores(model: str, left: list[str], right: list[str]) -> Json:
    pairs = list(zip(left * len(right) if len(left) == 1 else left, right, strict=False))
    data = [{"index": n, "object": "score", "score": _likeness(*pair)} for n, pair in enumerate(pairs)]
    return _listed("score", model, data, [*left, *right])


def ranks(model: str, query: str, documents: list[str], top: int) -> Json:
    found = sorted(range(len(documents)), key=lambda n: -_likeness(query, documents[n]))[: top or None]
    results = [{"index": n, "document": {"text": documents[n]}, "relevance_score": _likeness(query, documents[n])} for n in found]
    tokens = len(query) + sum(map(len, documents))
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results,
    }


def _vector(text: str) -> list[float]:
    return [float(sum(map(ord, text[i::16])) % 997) / 997 for i in range(16)]


def _likeness(one: str, other: str) -> float:
    """How many words of the first are in the second."""
    words = set(one.lower().split())
    return len(words & set(other.lower().split())) / max(1, len(words))


def _listed(prefix: str, model: str, data: list[Json], inputs: list[str]) -> Json:
    tokens = sum(map(len, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    identity = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time()), "model": model}
    return identity | {"data": data, "usage": usage}
