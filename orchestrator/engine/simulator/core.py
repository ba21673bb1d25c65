"""EngineCore: the process that holds the GPU memory, the segment and the scheduler, and answers the RPCs.

One thread, one loop: messages of the API server, the watcher each 100 ms, a step for each token. It does not care
whether the API server lives: when that is killed, this one stays, with its memory, as vLLM's does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from .args import EngineArgs
from .console import Console
from .environment import Environment
from .faults import Faults
from .gpu import OutOfMemory
from .loading import Loaded
from .pool import PoolCorrupted
from .rpc import CoreCalls
from .scheduler import Job, PrefixCache, Scheduler
from .shapes import Shape

_WATCH_S = 0.1
_NULL_RETRY_S = 0.01
_NULL_WARNING_S = 10.0


def run_core(args: EngineArgs, shape: Shape, env: Environment, channel: socket.socket) -> int:
    """The whole life of the forked child; returns its exit status."""
    console = Console("EngineCore")
    loaded: Loaded | None = None
    handled = (signal.SIGTERM, signal.SIGINT)

    def end(*_: object) -> None:
        for number in handled:  # The signal comes twice: to the session, and from the API server.
            signal.signal(number, signal.SIG_IGN)
        sys.exit(0)

    deaf = "ignore_sigterm" in env.faults or "orphan_core" in env.faults
    for number in handled:
        signal.signal(number, signal.SIG_IGN if deaf else end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    try:
        loaded = Loaded(args, shape, env)
        loaded.load(console)
        EngineCore(loaded, channel, console, end).run()
    except OutOfMemory as error:
        _failed_to_start(console, error, "torch.OutOfMemoryError")
    except PoolCorrupted as error:
        console.vllm("ERROR", "core.py:1180", "EngineCore encountered a fatal error.")
        console.failure(error, "IndexError: list index out of range")
    except SystemExit:
        return 0
    except Exception as error:
        _failed_to_start(console, error, None)
    finally:
        if loaded is not None:
            loaded.release()
    return 1


def _failed_to_start(console: Console, error: Exception, name: str | None) -> None:
    console.vllm("ERROR", "core.py:1175", "EngineCore failed to start.")
    console.failure(error, name)


class EngineCore:
    """The loop of a loaded engine."""

    def __init__(self, loaded: Loaded, channel: socket.socket, console: Console, end: Any) -> None:
        self._loaded = loaded
        self._env = loaded.env
        self._channel: socket.socket | None = channel
        self._console = console
        self._end = end
        self._faults = loaded.env.faults
        self._fault_start = 0  # requests that came before the faults in force were set
        self._hung = self._faults.get("hang_after") == 0
        self._inbox = b""
        self._held_calls: list[dict[str, Any]] = []
        self._stats: dict[str, Any] = {}
        self._null_waited_from = time.monotonic()
        self._null_warned_at = float("-inf")
        self.scheduler = self._new_scheduler()
        self._usage = 0.0
        self._calls = CoreCalls(loaded, self.scheduler, console)

    def run(self) -> None:
        self._tend_pool()
        inode = self._loaded.segment.inode if self._loaded.segment else None
        path = str(self._loaded.segment.path) if self._loaded.segment else None
        self._send(
            {"ready": {"max_model_len": self._loaded.max_model_len, "segment": path, "inode": inode}} | {"stats": self._read_stats()}
        )
        next_watch = next_step = time.monotonic()
        while True:
            now = time.monotonic()
            stepping = self._ready and self.scheduler.busy and not self.scheduler.paused and not self._hung
            wakes = [next_watch, *([next_step] if stepping else []), *([] if self._ready else [now + _NULL_RETRY_S])]
            if self._has_message(max(0.0, min(wakes) - now)):
                self._read_messages()
            now = time.monotonic()
            if now >= next_watch:
                self._watch()
                next_watch = now + _WATCH_S
            if stepping and now >= next_step:
                self._step()
                next_step = max(now, next_step + self._step_s)
            elif not stepping:
                next_step = now
            self._tend_pool()
            self._tell_stats()

    @property
    def _ready(self) -> bool:
        return self._loaded.pool.null_block is not None

    @property
    def _step_s(self) -> float:
        return self._faults.get("slow_step", self._env.step_s)

    def _new_scheduler(self) -> Scheduler:
        args, env, pool = self._loaded.args, self._env, self._loaded.pool
        cache = None
        if args.enable_prefix_caching:
            tokens = env.max_cached_tokens if env.kvcached else -1
            cache = PrefixCache(pool, tokens if tokens <= 0 else max(1, tokens // args.block_size))
        return Scheduler(pool, cache, block_size=args.block_size, max_num_seqs=args.max_num_seqs)

    def _watch(self) -> None:
        segment = self._loaded.segment
        if segment is not None and self._env.prealloc and self._ready:
            total_bytes = segment.total_bytes()
            if total_bytes is not None:
                self._loaded.pool.observe(total_bytes)

    def _tend_pool(self) -> None:
        """kvcached's background threads: reserve the null block, however long that takes; keep a few pages mapped."""
        pool = self._loaded.pool
        if self._ready or pool.reserve_null_block():
            if self._env.prealloc:
                pool.refill()
            self._run_held_calls()
            return
        now = time.monotonic()
        if now - self._null_warned_at >= _NULL_WARNING_S:
            self._null_warned_at = now
            self._console.kvcached(
                "WARNING",
                "kv_cache_manager.py:383",
                "Waiting for physical KV capacity to reserve null block: reason=no_effective_capacity, "
                f"elapsed={now - self._null_waited_from:.1f}s, virtual_free_pages={pool.free}, physical_free_pages=0, "
                f"reserved_physical_pages={pool.reserved}",
            )

    def _step(self) -> None:
        if self._calls.weights_lost and not self.scheduler.paused:
            self._console.vllm("ERROR", "core.py:1180", "EngineCore encountered a fatal error.")
            self._console.line("torch.AcceleratorError: CUDA error: an illegal memory access was encountered")
            os.kill(os.getpid(), signal.SIGKILL)
        if self._sprung("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._hung = self._hung or self._sprung("hang_after")  # a fault that was set since this step was due
        if self._hung or self._faults.get("stall_after") == 0 or self._sprung("stall_after"):
            return
        self.scheduler.prefill_tokens = int(self._faults.get("prefill_chunk", 0))
        moved = self.scheduler.step()
        self._usage = self._read_usage()
        if moved:
            self._send({"out": [[job.id, job.generated, job.finish_reason] for job in moved]})

    def _sprung(self, fault: str) -> bool:
        """Is a request that the fault waits for about to make its third token?"""
        first = self._faults.get(fault)
        return first is not None and any(job.generated == 2 and job.ordinal - self._fault_start >= first for job in self.scheduler.running)

    def _read_messages(self) -> None:
        if self._channel is None:
            return
        try:
            data = self._channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._channel.close()
            self._channel = None
            return
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "add" in message:
            self.scheduler.add(Job(*message["add"]))
        elif "abort" in message:
            self.scheduler.abort(message["abort"])
        elif message["call"] == "sim_fault":
            self._set_faults(Faults.parse(message["args"][0]))
            self._send({"reply": message["id"], "result": dict(self._faults)})
        elif self._hung or (not self._ready and message["call"] in ("kv_limit", "kv_trim")):
            self._held_calls.append(message)  # kvcached's own wait for the null block, or a step that never ends.
        else:
            self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            result, aborted = self._calls.call(message["call"], message["args"])
        except PoolCorrupted:
            raise
        except Exception as error:
            self._console.failure(error)
            self._send({"reply": message["id"], "error": f"{type(error).__name__}: {error}"})
            return
        if aborted:
            self._send({"out": [[job.id, job.generated, job.finish_reason] for job in aborted]})
        self._send({"reply": message["id"], "result": result, "stats": self._read_stats()})

    def _run_held_calls(self) -> None:
        if self._held_calls and not self._hung:
            held, self._held_calls = self._held_calls, []
            for message in held:
                self._answer(message)

    def _set_faults(self, faults: Faults) -> None:
        self._faults = faults
        self._calls.faults = faults
        self._fault_start = self.scheduler.added
        self._hung = faults.get("hang_after") == 0
        deaf = "ignore_sigterm" in faults or "orphan_core" in faults
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if deaf else self._end)

    def _tell_stats(self) -> None:
        stats = self._read_stats()
        if stats != self._stats:
            self._send({"stats": stats})

    def _read_stats(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "prompt_tokens": scheduler.prompt_tokens,
            "generation_tokens": scheduler.generation_tokens,
            "preemptions": scheduler.preemptions,
            "finished": dict(scheduler.finished),
            "asleep": scheduler.paused,
            "usage": self._usage,
        }

    def _read_usage(self) -> float:
        """Only with a step: it reads the card, and a read that is kept for 100 ms would blind the next allocation."""
        pool = self._loaded.pool
        return 1.0 - self.scheduler.free_blocks() / (pool.capacity_pages * pool.blocks_per_page)

    def _has_message(self, timeout_s: float) -> bool:
        if self._channel is None:
            time.sleep(timeout_s)
            return False
        return bool(select.select([self._channel], [], [], timeout_s)[0])

    def _send(self, message: dict[str, Any]) -> None:
        if "stats" in message:
            self._stats = message["stats"]
        if self._channel is None:
            return
        try:
            self._channel.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except OSError:
            self._channel = None
