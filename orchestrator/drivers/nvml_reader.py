"""The process in which NVML runs: asked with a byte, it answers with one line of JSON. drivers/nvml.py starts it, asks it and ends it.

    {"cards": [[index, uuid or null, name, total bytes, free bytes, [[pid, bytes], …], why it can not be read or null], …]}
    {"error": "what the driver says: the mend"}          nothing can be read; the process ends after that

libnvidia-ml may hang or crash, and then only this process does. It imports nvidia-ml-py (the module `pynvml`) and nothing of ours, so it
starts in a tenth of a second. It ends with the daemon however that ends, and not before it: signals for all of a terminal or of a
service pass it by. Keys are UUIDs: indices move between two inits of NVML, not within one, so a card is asked for its name once, and
again after it has failed.
"""

import contextlib
import ctypes
import faulthandler
import json
import resource
import signal
import socket
import sys
from typing import Any

import pynvml

PR_SET_PDEATHSIG = 1  # linux/prctl.h
Card = tuple[int, str | None, str, int, int, list[tuple[int, int]], str | None]


class Cards:
    """Raises NVMLError (from the constructor too) where the driver answers nothing. A card that fails says why."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._handles: dict[int, object] = {}
        self._names: dict[int, tuple[str, str]] = {}  # UUID and name, by index

    def read(self) -> list[Card]:
        return [self._one(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def _one(self, index: int) -> Card:
        try:
            if index not in self._handles:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                self._names[index] = (pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
                self._handles[index] = handle
            handle = self._handles[index]
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError as error:
            self._handles.pop(index, None)
            return (index, *self._names.get(index, (None, "")), 0, 0, [], said(error))
        return (index, *self._names[index], int(memory.total), int(memory.free), list(_processes(handle).items()), None)


def _processes(handle: object) -> dict[int, int]:
    """Bytes by pid. Empty where the driver does not tell: containers and virtual GPUs hide it, and the memory counts all the same."""
    found: dict[int, int] = {}
    with contextlib.suppress(pynvml.NVMLError):
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.usedGpuMemory is not None:
                found[process.pid] = found.get(process.pid, 0) + int(process.usedGpuMemory)
    return found


def said(error: Exception) -> str:
    """NVML's own words, and the mend where there is one."""
    match getattr(error, "value", None):
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            mend = ": no NVIDIA driver on this machine; gpus.source: simulated runs without one"
        case pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            mend = ": load it with `nvidia-modprobe`, or reboot after a driver upgrade"
        case pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            mend = ": the driver was upgraded under a running kernel module: reboot"
        case pynvml.NVML_ERROR_NO_PERMISSION:
            mend = ": this user may not open /dev/nvidia*: add it to the groups video and render"
        case pynvml.NVML_ERROR_GPU_IS_LOST:
            mend = ": it fell off the bus: `dmesg` has its Xid; reboot"
        case pynvml.NVML_ERROR_RESET_REQUIRED:
            mend = ": stop the daemon, then `nvidia-smi --gpu-reset`"
        case _:
            mend = ""
    return f"NVML: {error}{mend}"


def main(fd: int) -> None:
    faulthandler.enable()  # where it crashed, to the log
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a driver that crashes again and again must not fill the disk
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # one that hangs does not see that its socket has ended
    with socket.socket(fileno=fd) as asked:
        cards: Cards | None = None
        while asked.recv(1):
            answer: dict[str, Any]
            try:
                cards = cards or Cards()
                answer = {"cards": cards.read()}
            except pynvml.NVMLError as error:
                answer = {"error": said(error)}
            asked.sendall(json.dumps(answer).encode() + b"\n")
            if "error" in answer:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
