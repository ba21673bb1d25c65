"""Logs that never end: held under their bound while their writer goes on, with nothing torn, and nobody else's touched."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.drivers import log_files, processes
from tests.support.eventually import eventually_now
from tests.support.simulated import Workshop

STEM = "m-0a1b2c.00000001"
MOST = 1 << 20
WRITES = "import os, itertools\nfor n in itertools.count(): os.write(1, b'line %09d\\n' % n)\n"
LINE = len("line 000000000\n")


@contextmanager
def writer(log: Path) -> Iterator[processes.Process]:
    """A process that writes lines without end, as an engine is started: its output appended to a file."""
    process, child = processes.spawn([sys.executable, "-c", WRITES], os.environ, log)
    try:
        yield process
    finally:
        child.kill()
        child.wait()


def numbers(path: Path) -> list[int]:
    """Of its lines, each of which must be whole, but for the last of one that is written."""
    whole = path.read_bytes()
    assert b"\0" not in whole
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    assert all(len(line) == LINE - 1 and line.startswith(b"line ") for line in lines)
    return [int(line[5:]) for line in lines]


def test_a_log_that_is_written_without_end_stays_within_two_of_its_bound(tmp_path: Path) -> None:
    log = tmp_path / f"{STEM}.log"
    with writer(log) as process:
        for _ in range(5):
            eventually_now(lambda: log.stat().st_size > MOST, "it has grown over its bound")
            size = log.stat().st_size
            assert log_files.cap(tmp_path, MOST) == [log]
            assert log.stat().st_size < size  # and its writer did not leave a hole behind it
            assert processes.writing_to(log) == process  # who writes it is known by it
        last = log.stat().st_size
        eventually_now(lambda: log.stat().st_size > last, "it goes on")
    before, now = numbers(log_files.kept(log)), numbers(log)
    assert before[0] > 0
    assert before == sorted(before)
    assert now == sorted(now)
    assert before[-1] < now[0]
    assert log_files.kept(log).stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{STEM}.log", f"{STEM}.log.1"]


def test_a_log_under_its_bound_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / f"{STEM}.log"
    log.write_bytes(b"x" * MOST)
    assert log_files.cap(tmp_path, MOST) == []
    assert log.stat().st_size == MOST


@pytest.mark.parametrize("name", ["launch-server-default.log", "nvml.log", f"{STEM}.log"])
def test_all_that_the_daemon_starts_is_bounded(tmp_path: Path, name: str) -> None:
    log = tmp_path / name
    log.write_bytes(b"a" * 100)
    assert log_files.cap(tmp_path, 99) == [log]
    log_files.kept(log).write_bytes(b"older")
    log.write_bytes(b"b" * 100)
    assert log_files.cap(tmp_path, 99) == [log]
    assert (log.read_bytes(), log_files.kept(log).read_bytes()) == (b"", b"b" * 100)


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    """`dirs.logs` may be a folder that others log to; and a link in it may lead anywhere."""
    other = tmp_path / "other"
    other.mkdir()
    for path in (tmp_path / "syslog", tmp_path / "nginx.log", tmp_path / f"{STEM}.log.1", other / "nvml.log"):
        path.write_bytes(b"x" * 100)
    (tmp_path / "nvml.log").symlink_to(other / "nvml.log")
    os.mkfifo(tmp_path / f"{STEM}.log")
    assert log_files.cap(tmp_path, 10) == []
    assert (other / "nvml.log").stat().st_size == 100
    assert log_files.cap(tmp_path / "nowhere", 10) == []


def test_a_link_where_the_older_part_goes_is_replaced_not_followed(tmp_path: Path) -> None:
    log, victim = tmp_path / "nvml.log", tmp_path / "victim"
    victim.write_bytes(b"precious")
    log.write_bytes(b"x" * 100)
    log_files.kept(log).symlink_to(victim)
    assert log_files.cap(tmp_path, 10) == [log]
    assert victim.read_bytes() == b"precious"
    assert log_files.kept(log).read_bytes() == b"x" * 100


def test_where_no_copy_can_be_made_it_is_cut_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "nvml.log"
    log.write_bytes(b"x" * 100)
    (log_files.kept(log) / "in the way").mkdir(parents=True)
    assert log_files.cap(tmp_path, 10) == [log]
    assert log.stat().st_size == 0


def test_on_a_full_disk_no_half_of_a_copy_is_left(tmp_path: Path) -> None:
    """As another process sees it that may write no file larger than half of the log: what a full disk does to the copy."""
    log = tmp_path / "nvml.log"
    log.write_bytes(b"x" * MOST)
    program = (
        "import resource, signal, sys; from pathlib import Path; from orchestrator.drivers import log_files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MOST // 2}, {MOST // 2}))\n"
        "print(log_files.cap(Path(sys.argv[1]), 10))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "nvml.log" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["nvml.log"]
    assert log.stat().st_size == 0


@pytest.mark.asyncio
async def test_an_engine_whose_log_was_cut_still_tells_why_it_died(shop: Workshop) -> None:
    launch = await shop.started()
    log = shop.log(launch)
    with log.open("ab") as out:  # as its own lines are: appended
        out.write(b"(EngineCore pid=1) INFO a line a request\n" * 5_000)
    await shop.launcher.cap_logs(100_000)
    assert log.stat().st_size < 100_000 < log_files.kept(log).stat().st_size
    with log.open("ab") as out:
        out.write(b"RuntimeError: what it died of\n")
    os.kill(shop.pid(launch), signal.SIGKILL)
    await shop.failed(launch)
    assert "RuntimeError: what it died of" in shop.seen(launch).log_tail


@pytest.mark.asyncio
async def test_the_log_of_an_adopted_engine_is_bounded_too(shop: Workshop) -> None:
    launch = await shop.started()
    await shop.restart()
    await shop.launcher.adopt()
    with shop.log(launch).open("ab") as out:
        out.write(b"x" * 10_000)
    await shop.launcher.cap_logs(5_000)
    assert b"x" * 10_000 in log_files.kept(shop.log(launch)).read_bytes()
    assert shop.log(launch).stat().st_size < 5_000  # it is asked for its health, and writes lines


def test_logs_of_models_that_are_gone_go_after_a_while_and_nothing_else(tmp_path: Path) -> None:
    old = [f"gone-0123ab.{n}2345678.log" for n in range(2)]
    for name in (*old, f"{old[0]}.1", "new-0123ab.12345678.log", "here-0123ab.12345678.log", "launch-server-default.log", "other.log"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1000.0, 1000.0 if "new" not in name else 3000.0))
    assert sorted(log_files.drop(tmp_path, {"here-0123ab"}, 2000.0)) == [tmp_path / name for name in old]
    kept = ["here-0123ab.12345678.log", "launch-server-default.log", "new-0123ab.12345678.log", "other.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
