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


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user, which root alone may")
def test_another_users_file_is_no_segment(name: str) -> None:
    path = make(name, 3 * MIB, 2 * MIB, 0)
    assert kvcached.read(name) is not None
    os.chown(path, 65534, 65534)
    watched = kvcached.Watched(name)
    assert (kvcached.read(name), watched.read(), watched.again()) == (None, None, None)
    with pytest.raises(PermissionError, match="another user's"):
        kvcached.write_limit(name, 1)


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


# ---- kept open from look to look -------------------------------------------------------------------------------------


@pytest.fixture
def watched(name: str) -> Iterator[kvcached.Watched]:
    made = kvcached.Watched(name)
    yield made
    made.close()


def test_a_watched_segment_shows_every_write(name: str, watched: kvcached.Watched) -> None:
    assert (watched.read(), watched.again()) == (None, None)
    make(name, 7, 8, 9)
    assert watched.again() is None  # never read yet
    assert watched.read() == Segment(7, 8, 9)
    kvcached.write_limit(name, MIB)
    assert watched.again() == watched.read() == Segment(MIB, 8, 9)


def test_one_that_was_made_anew_or_removed_is_noticed_at_once(name: str, watched: kvcached.Watched) -> None:
    path = make(name, 7, 8, 9)
    assert watched.read() == Segment(7, 8, 9)
    other = path.with_name(f"{name}.new")
    other.write_bytes(struct.pack("@qqq", 1, 2, 3))
    other.rename(path)
    assert watched.again() == Segment(7, 8, 9)  # the file that was there
    assert watched.read() == watched.again() == Segment(1, 2, 3)
    path.unlink()
    assert watched.read() is None
    kvcached.restore(name, Segment(4, 5, 6))
    assert watched.read() == Segment(4, 5, 6)


@pytest.mark.parametrize("size", [0, 8, 23, 25, 4096])
def test_one_that_was_given_another_size_is_none_until_it_is_whole_again(name: str, size: int, watched: kvcached.Watched) -> None:
    path = SHM / name
    path.write_bytes(b"x" * size)
    assert watched.read() is None
    make(name, 7, 8, 9)
    assert watched.read() == Segment(7, 8, 9)
    path.write_bytes(b"x" * size)
    assert (watched.read(), watched.again()) == (None, None)
    kvcached.restore(name, Segment(0, 0, 0))
    assert watched.read() == Segment(0, 0, 0)


def test_an_engine_that_was_stopped_with_the_lock_in_its_hand_is_still_seen(name: str, watched: kvcached.Watched) -> None:
    with make(name, 7, 8, 9).open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert watched.read() == Segment(7, 8, 9)


@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_watched(name: str, what: str, watched: kvcached.Watched, tmp_path: Path) -> None:
    path = make(name, 7, 8, 9)
    assert watched.read() == Segment(7, 8, 9)
    path.unlink()
    if what == "link":
        (tmp_path / "victim").write_bytes(b"x" * 24)
        path.symlink_to(tmp_path / "victim")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert (watched.read(), watched.again()) == (None, None)
    assert kvcached.read(name) is None


def test_it_holds_one_file_however_often_its_segment_is_made_anew(name: str, watched: kvcached.Watched) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        (SHM / name).unlink(missing_ok=True)
        make(name, number, 0, 0)
        assert watched.read() == Segment(number, 0, 0)
    assert len(os.listdir("/proc/self/fd")) == files + 1
    watched.close()
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert watched.read() == Segment(19, 0, 0)


STORES = """
import fcntl, mmap, os, sys
path, rounds = sys.argv[1], int(sys.argv[2])
print("up", flush=True)
for number in range(rounds):
    file = os.open(path, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    with mmap.mmap(file, 24) as memory, memoryview(memory) as raw, raw.cast("q") as values:  # as kvcached's numpy view: int64 by int64
        values[0] = values[1] = values[2] = 0x1111111111111111 * (number % 7 + 1)
    os.close(file)
"""


def test_without_the_lock_no_value_is_half_of_one_write_and_half_of_another(name: str, watched: kvcached.Watched) -> None:
    path, whole = make(name, 0, 0, 0), {0x1111111111111111 * number for number in range(8)}
    engine = subprocess.Popen([sys.executable, "-c", STORES, str(path), "20000"], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    seen = set()
    try:
        assert engine.stdout.readline() == "up\n"
        while engine.poll() is None:
            segment = watched.read()
            assert segment is not None
            seen |= {segment.limit_bytes, segment.used_bytes, segment.prealloc_bytes}
        assert engine.returncode == 0
        assert seen <= whole
        assert len(seen) > 1
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
