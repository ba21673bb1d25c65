"""What the NVML process reads, from a library of our own that says what a test wants: built with gcc, loaded by the real pynvml.

The library obeys environment variables: FAKE_INIT and FAKE_COUNT fail a call, FAKE_<what>_<index> one of a card.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.policy.units import GIB

ROOT = Path(__file__).resolve().parents[2]
SUCCESS, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST, MISMATCH, UNKNOWN = 0, 3, 4, 9, 15, 18, 999

LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } process_t;
static int cards[2] = {0, 1};
static int code(const char *what, int index) {
    char name[64];
    if (index < 0) snprintf(name, sizeof name, "FAKE_%s", what);
    else snprintf(name, sizeof name, "FAKE_%s_%d", what, index);
    const char *value = getenv(name);
    return value ? atoi(value) : 0;
}
int nvmlInitWithFlags(unsigned int flags) { return code("INIT", -1); }
int nvmlInit_v2(void) { return code("INIT", -1); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int result) { return "an error"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return code("COUNT", -1); }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, int **device) { *device = &cards[index]; return code("HANDLE", index); }
int nvmlDeviceGetUUID(int *device, char *text, unsigned int size) { snprintf(text, size, "GPU-fake-%d", *device); return 0; }
int nvmlDeviceGetName(int *device, char *text, unsigned int size) { snprintf(text, size, "NVIDIA Fake"); return 0; }
int nvmlDeviceGetMemoryInfo(int *device, memory_t *memory) {
    memory->total = 80ULL << 30; memory->used = (unsigned long long)(*device + 1) << 30; memory->free = memory->total - memory->used;
    return code("MEMORY", *device);
}
int nvmlDeviceGetComputeRunningProcesses_v3(int *device, unsigned int *count, process_t *processes) {
    int failed = code("PROCESSES", *device);
    if (failed) return failed;
    if (*device == 1) { *count = 0; return 0; }
    if (*count < 4) { *count = 4; return 7; }
    process_t all[4] = {{11, 1ULL << 30, ~0u, ~0u}, {12, ~0ULL, ~0u, ~0u}, {13, 5, 0, 0}, {13, 6, 1, 0}};
    memcpy(processes, all, sizeof all);
    *count = 4;
    return 0;
}
"""

PROGRAM = """
import json
from dataclasses import asdict
from orchestrator.drivers.nvml import Nvml
try:
    print(json.dumps({"cards": [asdict(reading) for reading in Nvml().read()]}))
except OSError as error:
    print(json.dumps({"error": str(error)}))
"""

LOOKS = """
import json, os, sys
from orchestrator.drivers.nvml_reader import Cards
cards, seen = Cards(), []
for faults in json.loads(sys.argv[1]):
    for name in [name for name in os.environ if name.startswith("FAKE_")]:
        del os.environ[name]
    os.environ.update({f"FAKE_{name}": str(code) for name, code in faults.items()})
    seen.append([(uuid, why) for index, uuid, name, total, free, held, why in cards.read()])
print(json.dumps({"seen": seen}))
"""

Read = Callable[..., dict[str, Any]]


def run(folder: Path, faults: dict[str, int], program: str = PROGRAM, *words: str) -> dict[str, Any]:
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)} | {f"FAKE_{name}": str(code) for name, code in faults.items()}
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a fake libnvidia-ml.so.1 with")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True)
    return folder


@pytest.fixture
def read(library: Path) -> Read:
    return lambda **faults: run(library, faults)


def test_cards_their_memory_and_who_holds_it(read: Read) -> None:
    first, second = read()["cards"]
    assert (first["uuid"], first["index"], first["name"]) == ("GPU-fake-0", 0, "NVIDIA Fake")
    assert (first["total_bytes"], first["free_bytes"], first["error"]) == (80 * GIB, 79 * GIB, None)
    # 12's bytes are not available; 13 has two instances on the card
    assert first["processes"] == {"11": GIB, "13": 11}
    assert (second["uuid"], second["free_bytes"], second["processes"]) == ("GPU-fake-1", 78 * GIB, {})


@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION, UNKNOWN])
def test_a_driver_that_hides_processes_still_tells_the_memory(read: Read, error: int) -> None:
    first, _ = read(PROCESSES_0=error)["cards"]
    assert (first["free_bytes"], first["processes"]) == (79 * GIB, {})


@pytest.mark.parametrize("what", ["HANDLE_0", "MEMORY_0"])
def test_a_card_that_was_lost_before_it_was_ever_read_is_left_out_and_the_other_one_keeps_its_index(read: Read, what: str) -> None:
    (card,) = read(**{what: GPU_IS_LOST})["cards"]
    assert (card["uuid"], card["index"]) == ("GPU-fake-1", 1)


def test_a_card_is_asked_for_its_name_once_and_again_after_it_has_failed(library: Path) -> None:
    faults = [{}, {"HANDLE_0": UNKNOWN}, {"MEMORY_0": GPU_IS_LOST}, {"HANDLE_0": NO_PERMISSION}, {}]
    *seen, last = run(library, {}, LOOKS, json.dumps(faults))["seen"]
    assert last == seen[0] == [["GPU-fake-0", None], ["GPU-fake-1", None]]
    assert [[uuid for uuid, _ in look] for look in seen] == [["GPU-fake-0", "GPU-fake-1"]] * 4
    why = [look[0][1] for look in seen]
    assert why[:2] == [None, None]
    assert why[2].startswith("NVML: ")
    assert why[2].endswith(": it fell off the bus: `dmesg` has its Xid; reboot")
    assert "groups video and render" in why[3]


@pytest.mark.parametrize("call", ["INIT", "COUNT"])
@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (MISMATCH, "driver was upgraded under a running kernel module: reboot"),
        (DRIVER_NOT_LOADED, "nvidia-modprobe"),
        (NO_PERMISSION, "groups video and render"),
    ],
)
def test_a_driver_that_answers_nothing_says_why_and_the_mend(read: Read, call: str, code: int, mend: str) -> None:
    error = read(**{call: code})["error"]
    assert error.startswith("NVML: ")
    assert mend in error


def test_an_error_without_a_mend(read: Read) -> None:
    assert read(INIT=UNKNOWN)["error"].startswith("NVML: ")


def test_no_driver_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")  # stands before a real one, also where there is one
    error = run(tmp_path, {})["error"]
    assert "no NVIDIA driver on this machine" in error
    assert "gpus.source: simulated" in error
