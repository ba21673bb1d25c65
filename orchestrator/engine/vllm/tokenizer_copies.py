"""Copies of a tokenizer that do not do again what depends on its words only.

vLLM keeps three shallow and two deep copies of a tokenizer, one for each thread. For each it reads the whole vocabulary anew, and
copy.deepcopy looks at every word: 1.1 s for the 152,000 words of Qwen2.5. The copies are as many and as apart as before; what is read
once is what cannot differ. Checked with vLLM 0.24.0; where another version has these names no more, it is left as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

WORDS = "_orchestrator_words"  # in a tokenizer's attributes, so that its copies have it
MANY = 1000


def install() -> None:
    try:
        from vllm.tokenizers import hf

        hf.get_cached_tokenizer, hf.copy = _reading_once(hf.get_cached_tokenizer), _Copy(hf.copy)
    except (ImportError, AttributeError) as error:
        print(f"tokenizers are copied as vLLM does it: {type(error).__name__}: {error}", flush=True)


def _reading_once(cached: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(cached)  # tokenizers are pickled with it, by its name
    def get_cached_tokenizer(tokenizer: Any) -> Any:
        mine = vars(tokenizer)
        words = mine.get(WORDS)
        if words is None or len(words) != len(tokenizer):  # words were added to this copy
            words = mine[WORDS] = tokenizer.get_vocab()
        mine["get_vocab"] = lambda: words
        try:
            made = cached(tokenizer)
        finally:
            del mine["get_vocab"]
        vars(made).pop("get_vocab", None)
        return made

    return get_cached_tokenizer


class _Copy:
    """The module copy as vLLM's tokenizers see it."""

    def __init__(self, copy: Any) -> None:
        self._copy = copy

    def deepcopy(self, value: Any) -> Any:
        tables = [held for held in vars(value).values() if type(held) is dict and len(held) > MANY and _plain(held)]
        return self._copy.deepcopy(value, {id(table): dict(table) for table in tables})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._copy, name)


def _plain(table: dict[Any, Any]) -> bool:
    """Words and numbers: a copy of it is a deep copy."""
    return {type(thing) for pair in table.items() for thing in pair} <= {str, int}
