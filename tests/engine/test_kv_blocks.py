"""kvcached's block objects, with a stand-in for its pool that is built as kvcached 0.1.6 builds it. In a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from orchestrator.drivers.vllm import SERVE

POOL = """
    class KVCacheBlock:
        made = 0
        def __init__(self, block_id):
            KVCacheBlock.made += 1
            self.block_id, self.is_null = block_id, False
    def inject():
        KVCacheBlockClass = KVCacheBlock
        class ElasticBlockPool:
            def __init__(self, num_gpu_blocks):
                self.kv_block_pool = [KVCacheBlockClass(i) for i in range(num_gpu_blocks)]
                self.null_block = self.kv_block_pool[0]
                self.null_block.is_null = True
        return ElasticBlockPool
    ElasticBlockPool = inject()
"""
COORDINATOR = """
    class BlockPool:
        def __init__(self, num_gpu_blocks, hash_block_size):
            self.blocks, self.hash_block_size = [object() for _ in range(num_gpu_blocks)], hash_block_size
    class KVCacheCoordinator:
        def __init__(self, blocks, replaced=True):
            self.native = self.block_pool = BlockPool(num_gpu_blocks=blocks, hash_block_size=16)
            if replaced:
                self.block_pool = "elastic"
    KVCacheCoordinator.__init__.__module__ = "kvcached.integration.vllm.patches"
"""
MIXED = "class Native:\n    def __init__(self, n):\n        super().__init__(n)\n        self.blocks = self.kv_block_pool\n"
MIXED += "ElasticBlockPool = type('ElasticBlockPool', (Native, ElasticBlockPool), {})\n"
USE = """
    import json, kv_blocks
    kv_blocks.install()
    from vllm.v1.core.block_pool import ElasticBlockPool, KVCacheBlock
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    native = KVCacheCoordinator(100_000).native
    try:
        refused = KVCacheCoordinator(100_000, replaced=False) is None
    except RuntimeError as error:
        refused = str(error)
    pool = ElasticBlockPool(100_000)
    at_first, blocks = KVCacheBlock.made, pool.kv_block_pool
    print(json.dumps({
        "at_first": at_first, "null": [pool.null_block.is_null, pool.null_block is blocks[0]], "same": blocks[7] is blocks[7],
        "ids": [blocks[7].block_id, blocks[-1].block_id, *(block.block_id for block in blocks[2:4])], "size": len(blocks),
        "made": KVCacheBlock.made, "all": sum(block.block_id for block in blocks), "made_then": KVCacheBlock.made,
        "native": [len(native.blocks), native.hash_block_size], "refused": refused,
    }))
"""


def seen(tmp_path: Path, pool: str = POOL, coordinator: str = COORDINATOR, more: str = "") -> tuple[dict[str, Any], str]:
    module = tmp_path / "vllm/v1/core/block_pool.py"
    module.parent.mkdir(parents=True)
    for folder in (module.parent, module.parent.parent, tmp_path / "vllm"):
        (folder / "__init__.py").touch()
    module.write_text(textwrap.dedent(pool) + more)
    module.with_name("kv_cache_coordinator.py").write_text(textwrap.dedent(coordinator))
    places = os.pathsep.join([str(tmp_path), str(SERVE.parent)])
    command = [sys.executable, "-c", textwrap.dedent(USE)]
    done = subprocess.run(command, env={"PYTHONPATH": places}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *told, answer = done.stdout.splitlines()
    return json.loads(answer), "".join(told)


@pytest.mark.parametrize("more", ["", MIXED], ids=["alone", "mixed with a native pool"])
def test_a_block_is_made_when_it_is_asked_for_and_once(tmp_path: Path, more: str) -> None:
    answer, told = seen(tmp_path, more=more)
    assert (answer["at_first"], answer["null"], answer["same"], told) == (1, [True, True], True, "")
    assert (answer["ids"], answer["size"], answer["made"]) == ([7, 99_999, 2, 3], 100_000, 5)
    assert (answer["all"], answer["made_then"]) == (sum(range(100_000)), 100_000)  # whoever looks at all of them gets all


def test_the_pool_that_is_thrown_away_is_small(tmp_path: Path) -> None:
    answer, _ = seen(tmp_path)
    assert answer["native"] == [2, 16]


def test_a_small_pool_that_is_not_thrown_away_ends_the_start(tmp_path: Path) -> None:
    answer, _ = seen(tmp_path)
    assert answer["refused"].startswith("kvcached has not replaced vLLM's pool")


def test_a_pool_that_is_built_otherwise_is_left_as_it_is(tmp_path: Path) -> None:
    answer, told = seen(tmp_path, pool=POOL.replace("KVCacheBlockClass", "Kind"))
    assert (answer["at_first"], answer["made_then"]) == (100_000, 100_000)
    assert told.startswith("KV blocks are all made at the start: ")


def test_a_coordinator_that_kvcached_does_not_patch_keeps_its_pool(tmp_path: Path) -> None:
    answer, told = seen(tmp_path, coordinator=COORDINATOR.replace("kvcached.", "vllm."))
    assert (answer["native"], answer["refused"]) == ([100_000, 16], False)
    assert told.startswith("KV blocks are all made at the start: ")
