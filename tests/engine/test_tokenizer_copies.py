"""Copies of tokenizers, with a stand-in for vLLM's module that copies as vLLM 0.24 does. In a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from orchestrator.drivers.vllm import SERVE

HF = """
    import copy
    class Tokenizer:
        reads = 0
        def __init__(self, words):
            self.words = {f"w{number}": number for number in range(words)}
            self.added, self.nested = {}, {"a": [1]}
        def get_vocab(self):
            Tokenizer.reads += 1
            return {**self.words, **self.added}
        def __len__(self):
            return len(self.words) + len(self.added)
    def get_cached_tokenizer(tokenizer):
        cached_tokenizer = copy.copy(tokenizer)
        tokenizer_vocab = tokenizer.get_vocab()
        class CachedTokenizer(tokenizer.__class__):
            def get_vocab(self):
                return tokenizer_vocab
            def __reduce__(self):
                return get_cached_tokenizer, (tokenizer,)
        cached_tokenizer.__class__ = CachedTokenizer
        return cached_tokenizer
    def pool(tokenizer):
        return copy.copy(tokenizer), copy.deepcopy(tokenizer)
"""
USE = """
    import copy, json, pickle, tokenizer_copies
    tokenizer_copies.install()
    from vllm.tokenizers import hf
    inner = hf.Tokenizer(5000)
    first = hf.get_cached_tokenizer(inner)
    shallow, deep = hf.pool(first)
    back = pickle.loads(pickle.dumps(deep))
    seen = {
        "reads": hf.Tokenizer.reads, "same": [it.get_vocab() == first.get_vocab() and len(it) == 5000 for it in (shallow, deep, back)],
        "apart": [deep.words is not inner.words, deep.nested["a"] is not inner.nested["a"], deep.words == inner.words],
        "left": [name for it in (inner, first, shallow, deep) for name in vars(it) if name == "get_vocab"],
    }
    inner.added["more"] = 5000
    seen["after more"] = ["more" in it.get_vocab() for it in (first, copy.copy(first), deep)]
    print(json.dumps(seen))
"""


def seen(tmp_path: Path, module: str) -> tuple[Any, str]:
    home = tmp_path / "vllm/tokenizers"
    home.mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").touch()
    (home / "__init__.py").touch()
    (home / "hf.py").write_text(textwrap.dedent(module))
    command = [sys.executable, "-c", textwrap.dedent(USE)]
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    done = subprocess.run(command, env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *told, answer = done.stdout.splitlines()
    return json.loads(answer), "".join(told)


def test_the_words_are_read_once_and_every_copy_has_them(tmp_path: Path) -> None:
    answer, told = seen(tmp_path, HF)
    assert (answer["reads"], answer["same"], told) == (1, [True, True, True], "")


def test_a_deep_copy_shares_nothing_that_can_change(tmp_path: Path) -> None:
    answer, _ = seen(tmp_path, HF)
    assert (answer["apart"], answer["left"]) == ([True, True, True], [])


def test_words_that_were_added_are_in_the_copies_made_after_that(tmp_path: Path) -> None:
    answer, _ = seen(tmp_path, HF)
    assert answer["after more"] == [False, True, False]  # as vLLM has it: what was cached stays


def test_a_vllm_of_other_names_copies_its_own_way(tmp_path: Path) -> None:
    answer, told = seen(
        tmp_path,
        HF.replace("import copy\n", "import copy as copying\n")
        .replace("copy.copy(", "copying.copy(")
        .replace("copy.deepcopy(", "copying.deepcopy("),
    )
    assert (answer["reads"], answer["same"]) == (4, [True, True, True])
    assert told.startswith("tokenizers are copied as vLLM does it: ")
