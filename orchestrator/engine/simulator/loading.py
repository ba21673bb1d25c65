"""An engine comes up: the memory it takes, in vLLM's order, with vLLM's lines in the log and vLLM's ways to fail.

Context, weights, the peak of a profiling run (which PyTorch's cache keeps), KV. What was taken is in `Loaded`, and only
there, so that an end at any point gives back what it must.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.shared_memory import SharedMemory

from .args import EngineArgs
from .console import Console
from .environment import Environment
from .gpu import GpuGroup, OutOfMemory, SimGpu, read_cards, visible_cards
from .kv_memory import KvMemory, StaticMemory
from .pool import Pool
from .segment import Segment, WorkerSockets, segment_name
from .shapes import Shape

_CONTEXT_BYTES = 512 * 2**20
_QUEUE_BYTES = 1 << 16
_PROFILE_BYTES = 2 * 2**30  # measured on an H200 with vLLM 0.24.0: the same for every model size
_V2_DEFAULT = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM")
_MORE = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."


class KVCachedConfigError(Exception):
    """kvcached refuses to run with this configuration."""


class Loaded:
    """What a loading engine holds; all bytes are for each GPU."""

    def __init__(self, args: EngineArgs, shape: Shape, env: Environment) -> None:
        self.args = args
        self.env = env
        self.shape = shape
        self.weights_bytes = int(shape.weights_bytes * env.memory_scale) // args.tensor_parallel_size
        self.profile_bytes = int(_PROFILE_BYTES * env.memory_scale)
        self.context_bytes = int(_CONTEXT_BYTES * env.memory_scale)
        self.bundle_bytes = shape.bundle_bytes(env.page_bytes)
        self.tokens_per_page = shape.tokens_per_page(env.page_bytes, args.tensor_parallel_size)
        self.gpus = self._open_gpus()
        self.segment: Segment | None = None
        self._sockets: WorkerSockets | None = None
        self._queue: SharedMemory | None = None  # to the workers; a resource tracker removes it where this process is killed
        self.max_model_len = 0
        self.sleeping_bytes = self.weights_bytes  # what sleep gives back, and wake takes again
        self.pool: Pool

    def release(self) -> None:
        """An orderly end: the segment goes, the sockets to the workers stay, as kvcached leaves them."""
        if self.segment is not None:
            self.segment.unlink()
        if self._queue is not None:
            self._queue.close()
            self._queue.unlink()
        self.gpus.close()

    def load(self, console: Console) -> None:
        faults = self.env.faults
        if self.env.kvcached:
            if self.env.v2_runner and self.shape.architecture in _V2_DEFAULT:
                raise KVCachedConfigError(f"{self.shape.architecture} runs on vLLM's V2 model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
            names = "elastic_block_pool, engine_core, mp_client, kv_cache_coordinator, kv_cache_manager, gpu_worker"
            console.kvcached("INFO", "patch_base.py:178", f"Successfully patched vllm: {names}")
        if "die_at_start" in faults:
            time.sleep(faults["die_at_start"])
            raise RuntimeError("simulated failure at start")
        if self.args.tensor_parallel_size > 1:
            self._queue = SharedMemory(create=True, size=_QUEUE_BYTES)
        self._wait(0.1)
        if not self.env.kvcached:
            self._check_utilization()
        self.gpus.take(self.context_bytes)
        self._load_weights(console)
        while "hang_at_start" in faults:
            time.sleep(60)
        self.gpus.take(self.profile_bytes)
        self._wait(0.2)
        self._open_kv(console)

    def _open_gpus(self) -> GpuGroup:
        cards = visible_cards(read_cards(self.env.gpu_dir), self.env.cuda_visible_devices)
        if not cards:
            raise RuntimeError("No CUDA GPUs are available")
        if len(cards) < self.args.tensor_parallel_size:
            raise ValueError(
                f"World size ({self.args.tensor_parallel_size}) is larger than the number of available GPUs ({len(cards)}) in this node."
            )
        return GpuGroup([SimGpu(self.env.gpu_dir, card) for card in cards[: self.args.tensor_parallel_size]])

    def _load_weights(self, console: Console) -> None:
        console.info("gpu_model_runner.py:5160", f"Starting to load model {self.args.model}...")
        if "oom_at_start" in self.env.faults:
            raise OutOfMemory(f"CUDA out of memory. Tried to allocate {self.weights_bytes / 2**30:.2f} GiB.")
        began = time.monotonic()
        self.gpus.take(self.weights_bytes)
        self._wait(0.6)
        took = time.monotonic() - began
        console.info("default_loader.py:430", f"Loading weights took {took:.2f} seconds")
        console.info(
            "gpu_model_runner.py:5255",
            f"Model loading took {self.weights_bytes / 2**30:.2f} GiB memory and {took:.6f} seconds",
        )

    def _open_kv(self, console: Console) -> None:
        available = self._available_kv_bytes()
        if available <= 0:
            raise ValueError(
                "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
                "the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). " + _MORE
            )
        console.info("gpu_worker.py:508", f"Available KV cache memory: {available / 2**30:.2f} GiB")
        self.max_model_len = self._check_max_model_len(available)
        pages = available // self.bundle_bytes
        if pages < 1:
            raise ValueError(f"No available memory for the cache blocks. {_MORE}")
        tokens = pages * self.tokens_per_page
        console.info("kv_cache_utils.py:2146", f"GPU KV cache size: {tokens:,} tokens")
        console.info(
            "kv_cache_utils.py:2147",
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {tokens / self.max_model_len:.2f}x",
        )
        if self.env.kvcached:
            self._open_elastic_kv(console, pages)
        else:
            self.gpus.take(pages * self.bundle_bytes)
            self.sleeping_bytes += pages * self.bundle_bytes
            self.pool = self._new_pool(pages, StaticMemory())
        self._wait(0.1)

    def _open_elastic_kv(self, console: Console, pages: int) -> None:
        name = segment_name(self.env.ipc_name)
        self._sockets = WorkerSockets(name, self.args.tensor_parallel_size)
        self._sockets.open()
        self.gpus.take(self.bundle_bytes)  # The zero page that all unmapped pages show: never counted in the segment.
        self.segment = Segment(name)
        self.segment.create(pages * self.bundle_bytes)
        memory = KvMemory(self.gpus, self.bundle_bytes, self.env.gpu_utilization, self.segment)
        self.pool = self._new_pool(pages, memory)
        layer_mib = pages * self.env.page_bytes // 2**20
        console.plain(
            f"Init C++ PageAllocator: num_layers={self.shape.layers}, mem_size_per_layer={layer_mib}MB, "
            f"total_mem_size={pages * self.bundle_bytes // 2**20}MB, page_size={self.env.page_bytes // 2**20}MB, "
            f"world_size={self.args.tensor_parallel_size}, pp_rank=0, async_sched=1, contiguous_layout=1, "
            f"enable_prealloc={int(self.env.prealloc)}, num_kv_buffers=2, group_id=0, "
            f"min_reserved_pages={min(pages, self.env.min_reserved_pages)}, "
            f"max_reserved_pages={min(pages, self.env.max_reserved_pages)}"
        )

    def _new_pool(self, pages: int, memory: KvMemory | StaticMemory) -> Pool:
        return Pool(
            capacity_pages=pages,
            blocks_per_page=self.tokens_per_page // self.args.block_size,
            bundle_bytes=self.bundle_bytes,
            page_bytes=self.env.page_bytes,
            physical=memory,
            ledger=memory,
            min_reserved=self.env.min_reserved_pages,
            max_reserved=self.env.max_reserved_pages,
        )

    def _available_kv_bytes(self) -> int:
        if self.args.kv_cache_memory_bytes is not None:
            return self.args.kv_cache_memory_bytes
        wanted = int(self.gpus.total_bytes * self.args.gpu_memory_utilization)
        return wanted - self.weights_bytes - self.context_bytes - self.profile_bytes

    def _check_max_model_len(self, available: int) -> int:
        derived, asked = self.shape.max_positions, self.args.max_model_len
        fitting = available * self.tokens_per_page // self.bundle_bytes // self.args.block_size * self.args.block_size
        if asked == -1:
            return min(derived or sys.maxsize, fitting)
        if asked is not None and derived is not None and asked > derived:
            raise ValueError(
                f"User-specified max_model_len ({asked}) is greater than the derived max_model_len "
                f"(max_position_embeddings={derived} or model_max_length=None in model's config.json)."
            )
        length = asked or derived or 32768
        if length > fitting:
            blocks = -(-length // self.args.block_size)
            needed = blocks * self.args.block_size * self.bundle_bytes // self.tokens_per_page
            estimate = f"Based on the available memory, the estimated maximum model length is {fitting}. " if fitting else ""
            raise ValueError(
                f"To serve at least one request with the model's max seq len ({length}), ({needed / 2**30:.2f} GiB KV "
                f"cache is needed, which is larger than the available KV cache memory ({available / 2**30:.2f} GiB). "
                f"{estimate}Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
                f"backend) or decreasing `max_model_len` when initializing the engine. {_MORE}"
            )
        return length

    def _check_utilization(self) -> None:
        """Plain vLLM takes its share of the card at once, or does not start. kvcached waives the check."""
        wanted, free = int(self.gpus.total_bytes * self.args.gpu_memory_utilization), self.gpus.free_bytes()
        if free < wanted:
            raise ValueError(
                f"Free memory on device cuda:0 ({free / 2**30:.2f}/{self.gpus.total_bytes / 2**30:.2f} GiB) on startup "
                f"is less than desired GPU memory utilization ({self.args.gpu_memory_utilization}, "
                f"{wanted / 2**30:.2f} GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
                "processes."
            )

    def _wait(self, share: float) -> None:
        time.sleep(self.env.load_s * share)
