"""kvcached's segments, as real files in /dev/shm. Names and layout are those of kvcached 0.1.6, byte for byte."""

import contextlib
import fcntl
import os
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.drivers import kvcached
from orchestrator.policy.snapshot import Segment

SHM = Path("/dev/shm")
MIB = 2**20


@pytest.fixture
def name() -> Iterator[str]:
    made = f"orch-test-{uuid.uuid4().hex[:8]}"
    yield made
    kvcached.remove(made)


def make(name: str, *fields: int) -> Path:
    """As kvcached makes it: three int64 of the machine's byte order."""
    path = SHM / name
    path.write_bytes(struct.pack("@qqq", *fields))
    return path


def test_reads_what_kvcached_writes(name: str) -> None:
    make(name, 20448 * MIB, 96 * MIB, 480 * MIB)
    assert kvcached.read(name) == Segment(limit_bytes=20448 * MIB, used_bytes=96 * MIB, prealloc_bytes=480 * MIB)
    assert kvcached.LAYOUT.size == 24


def test_writes_the_limit_and_nothing_else(name: str) -> None:
    path = make(name, 7, 96 * MIB, 480 * MIB)
    inode = path.stat().st_ino
    kvcached.write_limit(name, 3 * MIB)
    assert path.read_bytes() == struct.pack("@qqq", 3 * MIB, 96 * MIB, 480 * MIB)
    assert path.stat().st_ino == inode  # the engine knows its segment by the inode


def test_what_is_missing_is_never_created(name: str) -> None:
    assert kvcached.read(name) is None
    with pytest.raises(FileNotFoundError):
        kvcached.write_limit(name, MIB)
    assert not (SHM / name).exists()


@pytest.mark.parametrize("size", [0, 8, 23, 25, 4096])
def test_a_file_of_another_size_is_no_segment(name: str, size: int) -> None:
    (SHM / name).write_bytes(b"x" * size)
    assert kvcached.read(name) is None
    with pytest.raises(OSError, match=f"has {size} bytes, not 24"):
        kvcached.write_limit(name, MIB)
    assert (SHM / name).read_bytes() == b"x" * size


def test_links_are_not_followed(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 24)
    (SHM / name).symlink_to(victim)
    assert kvcached.read(name) is None
    with pytest.raises(OSError, match="symbolic links"):
        kvcached.write_limit(name, MIB)
    assert kvcached.remove(name) == [str(SHM / name)]
    assert victim.read_bytes() == b"x" * 24


def test_a_lock_is_not_waited_for_for_ever(name: str) -> None:
    path = make(name, 1, 2, 3)
    files = len(os.listdir("/proc/self/fd"))
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        assert kvcached.read(name) is None
        with pytest.raises(OSError, match="stayed locked"):
            kvcached.write_limit(name, MIB)
        assert time.monotonic() - began < 5  # the loop waits meanwhile
    assert path.read_bytes() == struct.pack("@qqq", 1, 2, 3)
    assert len(os.listdir("/proc/self/fd")) == files
    kvcached.write_limit(name, MIB)  # and it is free again


def test_readers_do_not_shut_each_other_out(name: str) -> None:
    with make(name, 1, 2, 3).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert kvcached.read(name) == Segment(1, 2, 3)


ENGINE = """
import fcntl, os, struct, sys
path, rounds = sys.argv[1], int(sys.argv[2])
print("up", flush=True)
for number in range(1, rounds + 1):
    file = os.open(path, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    total, _, _ = struct.unpack("=qqq", os.pread(file, 24, 0))  # kvcached re-reads the struct before it writes
    os.pwrite(file, struct.pack("=qqq", total, number, number), 0)
    os.close(file)
print("done", flush=True)
"""


def test_an_engine_and_the_daemon_writing_at_once_lose_nothing(name: str) -> None:
    path, rounds = make(name, 0, 0, 0), 20_000
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, str(path), str(rounds)], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    try:
        assert engine.stdout.readline() == "up\n"
        limit = 0
        while engine.poll() is None:
            with contextlib.suppress(OSError):  # stayed locked: the loop would write it again
                kvcached.write_limit(name, limit + 1)
                limit += 1
            seen = kvcached.read(name)
            if seen is not None:
                assert seen.limit_bytes == limit
                assert seen.used_bytes == seen.prealloc_bytes  # never half of a write
        assert engine.stdout.read() == "done\n"
        assert limit > 0
        assert kvcached.read(name) == Segment(limit, rounds, rounds)
    finally:
        engine.kill()
        engine.communicate()


@pytest.mark.parametrize(
    ("ipc", "folder"),
    [  # what kvcached 0.1.6's get_tp_socket_dir() answers
        ("orch-qwen-7b-0123abcd", "/tmp/kvcached-tp-orch-qwen-7b-0123abcd-d48ab1f7"),
        ("orch-model-deadbeef", "/tmp/kvcached-tp-orch-model-deadbeef-2ebbad6a"),
    ],
)
def test_removes_the_paths_that_kvcached_makes(ipc: str, folder: str) -> None:
    path = Path(folder)
    (path / "pp1").mkdir(parents=True)
    (path / "w0.sock").touch()
    (path / "pp1/w0.sock").touch()
    make(ipc, 1, 2, 3)
    assert kvcached.remove(ipc) == [f"/dev/shm/{ipc}", folder]
    assert not path.exists()
    assert not (SHM / ipc).exists()
    assert kvcached.remove(ipc) == []


def test_removes_only_its_own_names(name: str) -> None:
    others = [f"{name}0", name[:-1], f"{name}_g1"]
    for other in others:
        make(other, 1, 2, 3)
    folder = Path(f"/tmp/kvcached-tp-{name}-00000000")  # another digest: another name's folder
    folder.mkdir()
    try:
        make(name, 1, 2, 3)
        assert kvcached.remove(name) == [str(SHM / name)]
        assert all((SHM / other).exists() for other in others)
        assert folder.exists()
    finally:
        for other in others:
            (SHM / other).unlink()
        folder.rmdir()


# ---- made anew ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"", b"x" * 8, b"x" * 24, b"x" * 4096])
def test_a_segment_is_made_anew_whatever_is_left_of_it(name: str, before: bytes | None) -> None:
    path = SHM / name
    if before is not None:
        path.write_bytes(before)
    kvcached.restore(name, Segment(30 * MIB, 10 * MIB, 20 * MIB))
    assert path.read_bytes() == struct.pack("@qqq", 30 * MIB, 10 * MIB, 20 * MIB)
    assert kvcached.read(name) == Segment(30 * MIB, 10 * MIB, 20 * MIB)


def test_one_that_is_made_anew_in_place_stays_the_file_that_its_engine_knows(name: str) -> None:
    path = make(name, 1, 2, 3)
    inode = path.stat().st_ino
    path.write_bytes(b"")
    kvcached.restore(name, Segment(7 * MIB, 0, 0))
    assert path.stat().st_ino == inode


def test_nothing_is_made_anew_through_a_link_or_under_somebody_elses_lock(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (SHM / name).symlink_to(precious)
    with pytest.raises(OSError, match=r".+"):
        kvcached.restore(name, Segment(1, 2, 3))
    assert precious.read_text() == "mine"
    (SHM / name).unlink()
    path = make(name, 1, 2, 3)
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r".+"):
            kvcached.restore(name, Segment(4, 5, 6))
    assert path.read_bytes() == struct.pack("@qqq", 1, 2, 3)
