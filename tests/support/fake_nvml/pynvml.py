"""A module `pynvml` that obeys a folder, FAKE_NVML: its cards are those of a SimGpus there, and the file `fault` says what goes wrong.

A fault holds from the next look on, and one of a card for the whole life of its process, as a lost card does.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

NVML_ERROR_NO_PERMISSION, NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND = 4, 9, 12
NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED, NVML_ERROR_LIB_RM_VERSION_MISMATCH = 15, 16, 18
WORDS = {
    4: "Insufficient Permissions",
    9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found",
    15: "GPU is lost",
    16: "GPU requires reset",
    18: "RM has detected an NVML/RM version mismatch.",
}
FOLDER = Path(os.environ["FAKE_NVML"])
lost: set[int] = set()


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(WORDS.get(value, "Unknown Error"))
        self.value = value


def fault() -> list[str]:
    try:
        return (FOLDER / "fault").read_text().split()
    except FileNotFoundError:
        return []


def nvmlInit() -> None:
    with (FOLDER / "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    match fault():
        case ["hang", "init"]:
            signal.pause()
        case ["code", code]:
            raise NVMLError(int(code))


def nvmlDeviceGetCount() -> int:
    print("a library that chatters")
    match fault():
        case ["hang"]:
            while fault() == ["hang"]:
                time.sleep(0.05)
        case ["die", name]:
            os.kill(os.getpid(), signal.Signals[name])
        case ["exit", code]:
            os._exit(int(code))
        case ["raise"]:
            raise RuntimeError("what nobody thought of")
        case ["answer", *words]:
            os.write(int(sys.argv[1]), " ".join(words).encode() + b"\n")
        case ["code", code]:
            raise NVMLError(int(code))
        case ["lost", *indexes]:
            lost.update(map(int, indexes))
    return len(_cards())


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    if index in lost:
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    return index


def nvmlDeviceGetUUID(handle: int) -> str:
    return str(_cards()[handle]["uuid"])


def nvmlDeviceGetName(handle: int) -> str:
    return str(_cards()[handle]["name"])


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    if handle in lost:
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    card = _cards()[handle]
    used = int(card["base_bytes"]) + sum(_held(handle).values())  # type: ignore[call-overload]
    total = int(card["total_bytes"])  # type: ignore[call-overload]
    return SimpleNamespace(total=total, free=max(0, total - used), used=used)


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in _held(handle).items()]


def _cards() -> list[dict[str, object]]:
    try:
        cards: list[dict[str, object]] = json.loads((FOLDER / "gpus.json").read_text())
    except FileNotFoundError:
        raise NVMLError(NVML_ERROR_DRIVER_NOT_LOADED) from None
    return cards


def _held(index: int) -> dict[int, int]:
    found = {}
    for path in (FOLDER / f"held/{_cards()[index]['uuid']}").iterdir():
        pid, _, started = path.name.partition(".")
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX" and fields[19] == started:
                found[int(pid)] = int.from_bytes(path.read_bytes(), sys.byteorder)
        except FileNotFoundError:
            continue
    return found
