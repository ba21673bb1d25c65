"""Which GPUs an engine goes to: where the KV pressure is least, then where it fits best; distinct ones for its ranks.

Pressure is what the engines of a GPU take a second, for each byte of KV that they share after floors. Where nobody measures it:
the most room. A GPU without room is never one of the answers, and the same input gives the same answer in any order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import show_bytes

MOST_SETS = 100  # GPU sets that are tried for a tensor-parallel engine: all of 8 GPUs (70 at size 4), neighbours on larger boxes
ONE_RANK = ": CUDA shows a process one MIG device, so engines on them have tensor_parallel_size 1"


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


def ranks(spec: ModelSpec, gpus: Mapping[str, GpuReading]) -> list[str]:
    """Those of the allowed GPUs that one rank each may go to: CUDA shows a process one MIG device, so these never work together."""
    found, _ = allowed(spec, gpus)
    return found if spec.tensor_parallel_size == 1 else [uuid for uuid in found if not uuid.startswith("MIG-")]


def sets(spec: ModelSpec, gpus: Mapping[str, GpuReading]) -> tuple[tuple[str, ...], ...]:
    """Every GPU set that it could go to, lowest indexes first: what residency.choose() looks through where there is no room."""
    found, size = sorted(ranks(spec, gpus), key=lambda uuid: (gpus[uuid].index, uuid)), spec.tensor_parallel_size
    if math.comb(len(found), size) <= MOST_SETS:
        return tuple(combinations(found, size))
    return tuple(tuple(found[at : at + size]) for at in range(len(found) - size + 1))


def pressures(rates: Mapping[str, float], room: Mapping[str, int], need_bytes: int) -> dict[str, float]:
    """KV bytes a second that the engines of each GPU take, for each byte that is left to share beside floors and the newcomer's need."""
    return {uuid: rates.get(uuid, 0.0) / max(1, size - need_bytes) for uuid, size in room.items()}


def place(
    spec: ModelSpec, need_bytes: int, room: Mapping[str, int], gpus: Mapping[str, GpuReading], pressure: Mapping[str, float] | None = None
) -> Placed | Refused:
    """`room`: bytes per GPU that are left when every engine there is at its floor. `pressure`: as pressures() has it, 0 where absent.

    Least pressure, then the least room that does; without pressures the most room. Ties go to the lower index.
    """

    def merit(uuid: str) -> tuple[float, int, int, str]:
        if pressure is None:
            return (0.0, -room[uuid], gpus[uuid].index, uuid)
        return (pressure.get(uuid, 0.0), room[uuid], gpus[uuid].index, uuid)

    best = sorted((uuid for uuid in ranks(spec, gpus) if uuid in room), key=merit)
    fitting = [uuid for uuid in best if room[uuid] >= need_bytes]
    if len(fitting) >= spec.tensor_parallel_size:
        return Placed(tuple(fitting[: spec.tensor_parallel_size]))
    if len(best) < spec.tensor_parallel_size:
        split = any(uuid.startswith("MIG-") for uuid in allowed(spec, gpus)[0])
        note = ONE_RANK if split and spec.tensor_parallel_size > 1 else ""
        return Refused(f"{wanted_gpus(spec)}, {len(best)} can be read{note}")
    shown = ", ".join(
        f"GPU {gpus[uuid].index} has {show_bytes(max(0, room[uuid]))}" for uuid in sorted(best, key=lambda u: (-room[u], gpus[u].index))
    )
    return Refused(f"it needs {show_bytes(need_bytes)} on {_count(spec.tensor_parallel_size)}; beside the floors of the others {shown}")


def wanted_gpus(spec: ModelSpec) -> str:
    return "1 GPU wanted" if spec.tensor_parallel_size == 1 else f"{spec.tensor_parallel_size} GPUs wanted"


def _count(size: int) -> str:
    return "a GPU" if size == 1 else f"each of {size} GPUs"


def never_fits(spec: ModelSpec, parts: Mapping[str, int], floor: int, reserve: Mapping[str, int], gpus: Sequence[GpuReading]) -> str | None:
    """The arithmetic, if not even empty cards would do; None otherwise."""
    need = sum(parts.values()) + floor
    if spec.tensor_parallel_size > 1 and gpus and all(gpu.uuid.startswith("MIG-") for gpu in gpus):
        return f"{wanted_gpus(spec)}, and it may use MIG devices only{ONE_RANK}"
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
