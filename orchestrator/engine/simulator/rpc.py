"""What EngineCore answers between two steps: sleep and wake, and the four KV methods of `/collective_rpc`.

The KV methods are answered once for the engine, whatever the tensor-parallel size, as our code inside a real one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .console import Console
from .gpu import OutOfMemory
from .limit import MemoryLimit, no_pool
from .loading import Loaded
from .scheduler import Job, Scheduler

_TAGS = ("weights", "kv_cache")


class CoreCalls:
    """Calls by name. Each answers its result, and the jobs that it aborted."""

    def __init__(self, loaded: Loaded, scheduler: Scheduler, console: Console) -> None:
        self.faults = loaded.env.faults
        self.weights_lost = False  # A sleep that failed half way: the weights are gone and nobody will bring them back.
        self._loaded = loaded
        self._scheduler = scheduler
        self._console = console
        self._limit = MemoryLimit(loaded.pool) if loaded.env.kvcached else None
        self._asleep_tags: set[str] = set()
        self._profile_bytes = loaded.profile_bytes
        self._host_bytes = 0  # pinned by the first sleep at level 1, and kept

    def call(self, name: str, args: list[Any]) -> tuple[Any, list[Job]]:
        if name == "sleep":
            return self._sleep(int(args[0]))
        methods: dict[str, Callable[..., Any]] = {
            "wake_up": self._wake_up,
            "is_sleeping": lambda: self._scheduler.paused,
            "reset_prefix_cache": self._scheduler.drop_cache,
            "kv_limit": self._kv_limit,
            "kv_trim": self._kv_trim,
            "kv_empty_cache": self._kv_empty_cache,
            "kv_status": self._kv_status,
            "kv_host_memory": lambda: {"host_bytes": self._host_bytes},
        }
        if name not in methods:
            raise AttributeError(f"'Worker' object has no attribute '{name}'")
        return methods[name](*args), []

    def _sleep(self, level: int) -> tuple[None, list[Job]]:
        aborted = self._scheduler.abort_all()
        self._scheduler.paused = True
        if level < 1:
            return None, aborted
        self._scheduler.drop_cache()
        if self._asleep_tags:
            self._console.vllm("WARNING", "abstract.py:320", "Executor is already sleeping.")
            return None, aborted
        began = time.perf_counter()
        if self._loaded.args.enable_sleep_mode:
            freed = self._loaded.sleeping_bytes + self._kv_empty_cache()["freed_bytes"]
            self._loaded.gpus.give(self._loaded.sleeping_bytes)
            if level == 1:
                self._host_bytes = self._loaded.sleeping_bytes * self._loaded.args.tensor_parallel_size  # each worker pins its own
            if "sleep_500" in self.faults:
                self.weights_lost = True
                raise AssertionError("Memory usage increased after sleeping.")
            self._console.info("gpu_worker.py:181", f"Sleep mode freed {freed / 2**30:.2f} GiB memory")
        elif "sleep_500" in self.faults:
            raise AssertionError("Memory usage increased after sleeping.")
        self._asleep_tags = set(_TAGS)
        self._console.info("abstract.py:326", f"It took {time.perf_counter() - began:.6f} seconds to fall asleep.")
        return None, aborted

    def _wake_up(self, tags: list[str] | None = None) -> None:
        wanted = self._asleep_tags & set(tags or _TAGS)
        if not self._asleep_tags:
            self._console.vllm("WARNING", "abstract.py:331", "Executor is not sleeping.")
        if "weights" in wanted:
            if "wake_oom" in self.faults:
                raise OutOfMemory("CUDA Error: out of memory at csrc/cumem_allocator.cpp:139")
            if self._loaded.args.enable_sleep_mode:
                self._loaded.gpus.take(self._loaded.sleeping_bytes)
        self._asleep_tags -= wanted
        if not self._asleep_tags:
            self._scheduler.paused = False

    def _kv_limit(self, limit_bytes: str | int, revision: str | int) -> dict[str, Any]:
        if self._limit is None:
            return no_pool(int(limit_bytes), int(revision))
        pool, wanted = self._loaded.pool, int(limit_bytes)
        if pool.watched_bytes != min(wanted // pool.bundle_bytes, pool.capacity_pages) * pool.bundle_bytes:
            return {"status": "unsettled", "settled": False, "limit_bytes": wanted, "mapped_bytes": pool.mapped_bytes}
        return self._limit.set(wanted, int(revision)) | {"settled": True}

    def _kv_trim(self) -> dict[str, Any]:
        if self._limit is not None:
            self._loaded.pool.trim()
        return {"ok": True, "mapped_bytes": self._loaded.pool.mapped_bytes}

    def _kv_empty_cache(self) -> dict[str, Any]:
        freed, self._profile_bytes = self._profile_bytes, 0
        self._loaded.gpus.give(freed)
        return {"ok": True, "freed_bytes": freed}

    def _kv_status(self) -> dict[str, Any]:
        pool = self._loaded.pool
        return {
            "mapped_bytes": pool.mapped_bytes,
            "used_bytes": pool.in_use * pool.bundle_bytes,
            "capacity_bytes": pool.capacity_pages * pool.bundle_bytes,
            "limit_bytes": pool.limit_bytes,
            "bundle_bytes": pool.bundle_bytes,
            "requests_running": len(self._scheduler.running),
            "requests_waiting": len(self._scheduler.waiting),
        }
