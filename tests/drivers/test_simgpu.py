"""Simulated GPUs: used memory is what living processes hold, whatever lies in the folder besides."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.drivers.simgpu import BASE_BYTES, SimGpus
from orchestrator.policy.units import GIB, MIB

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpus(tmp_path: Path) -> SimGpus:
    return SimGpus(tmp_path, 2, 80 * GIB)


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def holds(gpus: SimGpus, pid: int, data: bytes, start: int | None = None, index: int = 0) -> Path:
    path = gpus.folder / f"held/GPU-sim-{index}/{pid}.{started(pid) if start is None else start}"
    path.write_bytes(data)
    return path


def test_empty_cards_show_what_the_driver_keeps(gpus: SimGpus) -> None:
    readings = gpus.read()
    assert [(r.uuid, r.index, r.total_bytes, r.used_bytes, r.error) for r in readings] == [
        ("GPU-sim-0", 0, 80 * GIB, BASE_BYTES, None),
        ("GPU-sim-1", 1, 80 * GIB, BASE_BYTES, None),
    ]
    written = json.loads((gpus.folder / "gpus.json").read_text())
    assert [set(card) for card in written] == [{"uuid", "name", "total_bytes", "base_bytes"}] * 2


def test_a_living_holder_counts_on_its_own_card(gpus: SimGpus) -> None:
    holds(gpus, os.getpid(), struct.pack("=q", 3 * GIB))
    first, second = gpus.read()
    assert first.processes == {os.getpid(): 3 * GIB}
    assert first.used_bytes == BASE_BYTES + 3 * GIB
    assert (second.processes, second.used_bytes) == ({}, BASE_BYTES)


def test_the_dead_count_nothing_and_are_swept(gpus: SimGpus, sleeper: "subprocess.Popen[bytes]") -> None:
    path = holds(gpus, sleeper.pid, struct.pack("=q", GIB))
    assert gpus.read()[0].processes == {sleeper.pid: GIB}
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
    assert gpus.read()[0].processes == {}
    assert not path.exists()


def test_a_pid_that_was_given_away_counts_nothing(gpus: SimGpus) -> None:
    holds(gpus, os.getpid(), struct.pack("=q", GIB), start=started(os.getpid()) - 1)
    assert gpus.read()[0].used_bytes == BASE_BYTES


@pytest.mark.parametrize("data", [b"", b"1234", b"123456789"])
def test_a_file_that_is_just_being_made_counts_nothing_yet(gpus: SimGpus, data: bytes) -> None:
    path = holds(gpus, os.getpid(), data)
    assert gpus.read()[0].processes == {}
    assert path.exists()


def test_one_who_gives_all_back_and_comes_again_is_seen_each_time(gpus: SimGpus) -> None:
    """Its file bears the same name, and the folder may have been changed within one tick of the kernel's clock."""
    for number in range(1, 200):
        path = holds(gpus, os.getpid(), struct.pack("=q", number * MIB))
        assert gpus.read()[0].processes == {os.getpid(): number * MIB}
        path.unlink()
        assert gpus.read()[0].processes == {}


def test_a_folder_that_did_not_change_is_not_listed_again(gpus: SimGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    path = holds(gpus, os.getpid(), struct.pack("=q", GIB))
    for card in gpus.read():
        os.utime(gpus.folder / "held" / card.uuid, (1e9, 1e9))  # long ago
    gpus.read()
    with monkeypatch.context() as patched:
        patched.delattr(os, "listdir")
        path.write_bytes(struct.pack("=q", 2 * GIB))
        assert gpus.read()[0].processes == {os.getpid(): 2 * GIB}
    path.unlink()
    assert gpus.read()[0].processes == {}


def test_one_who_dies_is_missed_although_the_folder_did_not_change(gpus: SimGpus, sleeper: "subprocess.Popen[bytes]") -> None:
    path = holds(gpus, sleeper.pid, struct.pack("=q", GIB))
    holds(gpus, os.getpid(), struct.pack("=q", MIB))
    gpus.read()
    os.utime(path.parent, (1e9, 1e9))
    assert set(gpus.read()[0].processes) == {sleeper.pid, os.getpid()}
    sleeper.kill()
    sleeper.wait()
    assert gpus.read()[0].processes == {os.getpid(): MIB}
    assert not path.exists()


def test_looks_hold_no_more_files_than_there_are_holders_and_give_them_back(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    before = len(os.listdir("/proc/self/fd"))
    gpus = SimGpus(tmp_path, 1, 80 * GIB)
    holds(gpus, os.getpid(), struct.pack("=q", GIB))
    holds(gpus, sleeper.pid, struct.pack("=q", GIB))
    for _ in range(20):
        gpus.read()
    assert len(os.listdir("/proc/self/fd")) == before + 2 * 2
    sleeper.kill()
    sleeper.wait()
    gpus.read()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del gpus
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["notes.txt", "0.1", "-1.1", "99999999.1"])
def test_what_is_no_living_process_counts_nothing(gpus: SimGpus, name: str) -> None:
    (gpus.folder / "held/GPU-sim-0" / name).write_bytes(struct.pack("=q", GIB))
    assert gpus.read()[0].used_bytes == BASE_BYTES


def test_free_is_never_below_nothing(gpus: SimGpus) -> None:
    holds(gpus, os.getpid(), struct.pack("=q", 200 * GIB))
    assert gpus.read()[0].free_bytes == 0


def test_a_folder_that_is_gone_is_an_oserror(gpus: SimGpus) -> None:
    (gpus.folder / "gpus.json").unlink()
    with pytest.raises(OSError, match=r"gpus\.json"):
        gpus.read()


def test_made_again_it_keeps_its_holders(gpus: SimGpus) -> None:
    """A daemon that comes again finds the engines that it left."""
    holds(gpus, os.getpid(), struct.pack("=q", GIB))
    assert SimGpus(gpus.folder, 2, 80 * GIB).read()[0].processes == {os.getpid(): GIB}


def test_reads_what_the_simulated_engines_write(gpus: SimGpus) -> None:
    command = [sys.executable, "-m", "orchestrator.engine.simulator.ballast", "--gpu", "GPU-sim-1", "--bytes", str(5 * GIB)]
    env = os.environ | {"SIM_GPU_DIR": str(gpus.folder)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as foreign:
        assert foreign.stdin is not None
        assert foreign.stdout is not None
        try:
            assert foreign.stdout.readline() == f"holding {5 * GIB}\n"
            assert gpus.read()[1].processes == {foreign.pid: 5 * GIB}
            print(f"give {100 * MIB}", file=foreign.stdin, flush=True)
            foreign.stdout.readline()
            assert gpus.read()[1].processes == {foreign.pid: 5 * GIB - 100 * MIB}
        finally:
            foreign.kill()
    assert gpus.read()[1].processes == {}
