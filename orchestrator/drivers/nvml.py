"""NVML through nvidia-ml-py (the module `pynvml`): every GPU's memory, and which process holds how much. Keys are UUIDs; indices move.

A card that fails is left out of the answer; only a driver that answers nothing raises. Indices move between two inits of NVML, not
within one, so a card is asked for its name once, and again after it has failed.
"""

import contextlib
from collections.abc import Sequence

import pynvml

from orchestrator.policy.snapshot import GpuReading


class Nvml:
    """Raises OSError (from the constructor too) with NVML's own words and the mend where there is one."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}{_mend(error)}") from None
        self._cards: dict[int, tuple[object, str, str]] = {}  # by index: handle, UUID, name

    def read(self) -> Sequence[GpuReading]:
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}{_mend(error)}") from None
        return [reading for index in range(count) if (reading := self._one(index)) is not None]

    def _one(self, index: int) -> GpuReading | None:
        try:
            if index not in self._cards:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                self._cards[index] = (handle, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
            handle, uuid, name = self._cards[index]
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError:
            self._cards.pop(index, None)
            return None  # control/observe.py keeps its last reading and says that it is not listed any more
        return GpuReading(uuid, index, name, int(memory.total), int(memory.free), _processes(handle))


def _processes(handle: object) -> dict[int, int]:
    """Bytes by pid. Empty where the driver does not tell: containers and virtual GPUs hide it, and the memory counts all the same."""
    found: dict[int, int] = {}
    with contextlib.suppress(pynvml.NVMLError):
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.usedGpuMemory is not None:
                found[process.pid] = found.get(process.pid, 0) + int(process.usedGpuMemory)
    return found


def _mend(error: Exception) -> str:
    match getattr(error, "value", None):
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return ": no NVIDIA driver on this machine; gpus.source: simulated runs without one"
        case pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return ": load it with `nvidia-modprobe`, or reboot after a driver upgrade"
        case pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return ": the driver was upgraded under a running kernel module: reboot"
        case pynvml.NVML_ERROR_NO_PERMISSION:
            return ": this user may not open /dev/nvidia*: add it to the groups video and render"
    return ""
