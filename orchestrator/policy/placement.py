"""Which GPUs an engine goes to: those with the most room after the floors of the engines that are there; distinct ones for its ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import show_bytes


@dataclass(frozen=True, slots=True)
class Placed:
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


def allowed(spec: ModelSpec, gpus: Mapping[str, GpuReading]) -> tuple[list[str], list[int | str]]:
    """The uuids a spec may use, in the order it names them (by index for auto), and the names that no GPU here has."""
    by_index = {str(gpu.index): uuid for uuid, gpu in gpus.items()}
    if spec.gpus == "auto":
        return sorted(gpus, key=lambda uuid: gpus[uuid].index), []
    found, unknown = [], []
    for wanted in spec.gpus:
        uuid = wanted if wanted in gpus else by_index.get(str(wanted))
        if isinstance(uuid, str):
            found += [uuid] if uuid not in found else []  # a card named by index and by UUID is still one card
        else:
            unknown.append(wanted)
    return found, unknown


def place(spec: ModelSpec, need_bytes: int, room: Mapping[str, int], gpus: Mapping[str, GpuReading]) -> Placed | Refused:
    """`room`: bytes per GPU that are left when every engine there is at its floor. Ties go to the lower index."""
    candidates, _ = allowed(spec, gpus)
    best = sorted((uuid for uuid in candidates if uuid in room), key=lambda uuid: (-room[uuid], gpus[uuid].index))
    fitting = [uuid for uuid in best if room[uuid] >= need_bytes]
    if len(fitting) >= spec.tensor_parallel_size:
        return Placed(tuple(fitting[: spec.tensor_parallel_size]))
    if len(best) < spec.tensor_parallel_size:
        return Refused(f"{spec.tensor_parallel_size} GPUs wanted, {len(best)} can be read")
    shown = ", ".join(f"GPU {gpus[uuid].index} has {show_bytes(max(0, room[uuid]))}" for uuid in best)
    return Refused(f"it needs {show_bytes(need_bytes)} on {_count(spec.tensor_parallel_size)}; beside the floors of the others {shown}")


def _count(size: int) -> str:
    return "a GPU" if size == 1 else f"each of {size} GPUs"


def never_fits(spec: ModelSpec, parts: Mapping[str, int], floor: int, reserve: Mapping[str, int], gpus: Sequence[GpuReading]) -> str | None:
    """The arithmetic, if not even empty cards would do; None otherwise."""
    need = sum(parts.values()) + floor
    fitting = [gpu for gpu in gpus if gpu.total_bytes - reserve[gpu.uuid] >= need]
    if len(fitting) >= spec.tensor_parallel_size:
        return None
    items = " + ".join(f"{name} {show_bytes(size)}" for name, size in (*parts.items(), ("KV floor", floor)))
    largest = max(gpus, key=lambda gpu: gpu.total_bytes - reserve[gpu.uuid], default=None)
    if largest is None:
        return "no GPU that it may use can be read"
    have = f"GPU {largest.index} has {show_bytes(largest.total_bytes)}, of which {show_bytes(reserve[largest.uuid])} are kept in reserve"
    where = _count(spec.tensor_parallel_size)
    mend = "use a larger tensor_parallel_size, a smaller --max-model-len or kv_floor, or a quantized source"
    return f"it needs {show_bytes(need)} on {where} ({items}), but {have}: {mend}"
