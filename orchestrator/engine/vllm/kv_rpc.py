"""Answer the daemon's kv_* calls inside EngineCore, where kvcached's KV manager lives, at any tensor-parallel size.

vLLM hands `POST /collective_rpc` to EngineCore.collective_rpc, which asks the workers; with tensor parallelism those are other
processes, without a KV manager. So install() puts ourselves before it: our method names are answered here, between two engine
steps (nothing races the scheduler), the others pass through. Every answer is one dict, whatever the number of workers.
"""

from collections.abc import Callable
from typing import Any

METHODS: dict[str, Callable[..., dict[str, Any]]] = {}


def method(call: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    METHODS[call.__name__] = call
    return call


@method
def kv_limit(core: Any, ask_workers: Callable[..., list[Any]], limit_bytes: str, revision: str) -> dict[str, Any]:
    """Apply a limit now (bytes per GPU), also while idle or starved: an engine reads its segment only inside an allocation.

    Nothing is done, and `settled` is False, until kvcached's watcher (100 ms) has seen the same value in the segment: the first
    allocation after a raise would put the old limit back in the middle of its work, and an EngineCore was seen to die right
    after such raises (vLLM 0.24.0, kvcached 0.1.6). The caller asks once more.
    """
    from kvcached.control import set_instance_memory_limit

    managers, wanted = _managers(), int(limit_bytes)
    bundle, capacity = sum(map(_bundle, managers)), sum(map(_capacity, managers))
    if managers and _watched(managers) != min(wanted, capacity) // bundle * bundle:
        return {"status": "unsettled", "settled": False, "limit_bytes": wanted, "mapped_bytes": sum(map(_mapped, managers))}
    answer: dict[str, Any] = set_instance_memory_limit(wanted, revision=int(revision))
    answer["settled"] = True
    return answer


@method
def kv_trim(core: Any, ask_workers: Callable[..., list[Any]]) -> dict[str, Any]:
    """Unmap the pages that are reserved and not used."""
    for manager in _managers():
        manager.trim()
    return {"ok": True, "mapped_bytes": sum(_mapped(manager) for manager in _managers())}


@method
def kv_empty_cache(core: Any, ask_workers: Callable[..., list[Any]]) -> dict[str, Any]:
    """Give back what PyTorch keeps: profiling leaves about 2 GiB there, for every model size. The most of any worker is answered."""
    return {"ok": True, "freed_bytes": max(ask_workers(empty_cache))}


@method
def kv_host_memory(core: Any, ask_workers: Callable[..., list[Any]]) -> dict[str, Any]:
    """Pinned host memory of all workers: what sleeping at level 1 takes. PyTorch keeps it after the wake, for the next time."""
    return {"host_bytes": sum(ask_workers(pinned_bytes))}


@method
def kv_status(core: Any, ask_workers: Callable[..., list[Any]]) -> dict[str, Any]:
    managers = _managers()
    scheduler = core.scheduler
    return {
        "mapped_bytes": sum(_mapped(manager) for manager in managers),
        "used_bytes": sum(int(m.page_allocator.get_page_state()["inuse_pages"]) * _bundle(m) for m in managers),
        "capacity_bytes": sum(map(_capacity, managers)),
        "limit_bytes": sum(int(m.memory_limit_state()["current_capacity_bytes"]) for m in managers),
        "bundle_bytes": sum(_bundle(manager) for manager in managers),
        "requests_running": len(scheduler.running),
        "requests_waiting": len(scheduler.waiting),
    }


def empty_cache(worker: Any) -> int:
    """Runs in each worker (by reference: the workers find this module on the sys.path that they inherit)."""
    import torch

    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    return int(before - torch.cuda.memory_reserved())


def pinned_bytes(worker: Any) -> int:
    """Runs in each worker."""
    import torch

    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def install() -> None:
    from vllm.v1.engine.core import EngineCore

    inner = EngineCore.collective_rpc

    def collective_rpc(self: Any, method: Any, timeout: Any = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> list[Any]:
        ours = METHODS.get(method) if isinstance(method, str) else None
        if ours is None:
            return list(inner(self, method, timeout, args, kwargs))

        def ask_workers(call: Callable[[Any], Any]) -> list[Any]:
            return list(inner(self, call))

        return [ours(self, ask_workers, *args)]

    EngineCore.collective_rpc = collective_rpc


def _managers() -> list[Any]:
    from kvcached.pool_registry import get_registered_kv_cache_pools

    return [manager for manager, _ in get_registered_kv_cache_pools()]


def _capacity(manager: Any) -> int:
    return int(manager.mem_size) * int(manager.num_layers) * int(manager.num_kv_buffers)


def _watched(managers: list[Any]) -> int:
    """The limit that the watchers saw last; before the segment ever changed, that is the capacity. Whole bundles."""
    total = 0
    for manager in managers:
        target = int(manager.page_allocator.get_resize_target())  # bytes per layer and buffer; -1: never changed
        pages = (int(manager.mem_size) if target < 0 else target) // int(manager.page_size)
        total += pages * _bundle(manager)
    return total


def _bundle(manager: Any) -> int:
    return int(manager.page_size) * int(manager.num_layers) * int(manager.num_kv_buffers)


def _mapped(manager: Any) -> int:
    state = manager.page_allocator.get_page_state()
    return (int(state["inuse_pages"]) + int(state["reserved_pages"])) * _bundle(manager)
