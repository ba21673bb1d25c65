"""KV blocks as Python objects, made when they are first handed out.

vLLM makes one for each block that could ever be mapped, 640,000 for a 0.5B model whose ceiling is a whole H200; kvcached throws these
away and makes its own: 1.7 s of EngineCore's start, and 60 MiB of host memory for blocks that its limit may never let it use. Here
vLLM's pool, which nobody uses, is small, and kvcached's makes a block when it is asked for it, the same each time. Checked with vLLM
0.24.0 and kvcached 0.1.6; where they are built otherwise, they are left as they are.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

NATIVE_BLOCKS = 2  # it takes one out for itself


class Blocks(list[Any]):
    """None where there is no object yet."""

    def __init__(self, blocks: list[Any], make: Callable[[int], Any]) -> None:
        super().__init__(blocks)
        self._make = make

    def __getitem__(self, index: Any) -> Any:
        block = super().__getitem__(index)
        if block is None:
            number = range(len(self))[index]
            block = self[number] = self._make(number)
        elif isinstance(index, slice):
            block = [self[number] for number in range(len(self))[index]]
        return block

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


def install() -> None:
    for change in (_elastic_pool, _native_pool):
        try:
            change()
        except (ImportError, AttributeError, StopIteration) as error:
            print(f"KV blocks are all made at the start: {type(error).__name__}: {error}", flush=True)


def _elastic_pool() -> None:
    from vllm.v1.core.block_pool import ElasticBlockPool

    pool = next(kind for kind in ElasticBlockPool.__mro__ if "KVCacheBlockClass" in _free_names(vars(kind).get("__init__")))
    begin = vars(pool)["__init__"]
    cell = begin.__closure__[_free_names(begin).index("KVCacheBlockClass")]
    make = cell.cell_contents

    @functools.wraps(begin)
    def begin_without_blocks(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.kv_block_pool = Blocks(self.kv_block_pool, make)

    cell.cell_contents = lambda number: None if number else make(number)  # the pool marks its first block itself
    pool.__init__ = begin_without_blocks


def _native_pool() -> None:
    from vllm.v1.core import kv_cache_coordinator as coordinators

    coordinator, pool = coordinators.KVCacheCoordinator, coordinators.BlockPool
    begin = coordinator.__init__
    if not begin.__module__.startswith("kvcached."):
        raise AttributeError("kvcached does not replace vLLM's pool")

    def small(num_gpu_blocks: int, *args: Any, **kwargs: Any) -> Any:
        return pool(min(num_gpu_blocks, NATIVE_BLOCKS), *args, **kwargs)

    @functools.wraps(begin)  # with kvcached's mark that it has patched this
    def begin_and_look(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if type(self.block_pool) is pool:
            raise RuntimeError("kvcached has not replaced vLLM's pool of KV blocks: see the lines above")

    coordinators.BlockPool, coordinator.__init__ = small, begin_and_look


def _free_names(function: Any) -> tuple[str, ...]:
    return tuple(getattr(getattr(function, "__code__", None), "co_freevars", ()))
