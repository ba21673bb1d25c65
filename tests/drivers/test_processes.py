"""Real sessions: who belongs to one, who is alive, and how an end is noticed. No pid is believed without its create time."""

import asyncio
import contextlib
import os
import pwd
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.drivers import processes
from orchestrator.drivers.processes import Child, Process
from tests.support.eventually import eventually, eventually_now

Spawn = Callable[..., tuple[Process, Child]]
ENV = {"PATH": "/usr/bin:/bin"}


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """`spawn(shell script)`; every session ends with the test."""
    made: list[tuple[Process, Child]] = []

    def start(script: str, log: Path = tmp_path / "out.log") -> tuple[Process, Child]:
        made.append(processes.spawn(["sh", "-c", script], ENV, log))
        return made[-1]

    yield start
    for process, child in made:
        while processes.members(process):
            processes.signal_session(process, signal.SIGKILL)
        child.wait()


def with_child(spawn: Spawn, tmp_path: Path) -> tuple[Process, Child, int]:
    """A leader and its child in one session, both waiting."""
    process, child = spawn("sleep 1000 & echo $! >&1; wait")
    log = tmp_path / "out.log"
    eventually_now(lambda: log.read_text().endswith("\n"), "the child is there")
    return process, child, int(log.read_text())


def test_a_session_of_its_own_whose_output_goes_to_a_file(spawn: Spawn, tmp_path: Path) -> None:
    log = tmp_path / "new/folder/engine.log"
    process, child = spawn("echo out; echo err >&2; cat; pwd; exec sleep 1000", log)
    eventually_now(lambda: log.exists() and log.read_text().endswith("/\n"), "all of its output")
    assert log.read_text() == "out\nerr\n/\n"  # and nothing to read on stdin
    assert os.getsid(process.pid) == process.pid
    assert child.poll() is None
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == str(processes.ENGINE_OOM_SCORE)
    assert set(psutil.Process(process.pid).environ()) - {"PWD", "OLDPWD", "_", "SHLVL"} == {"PATH"}  # nothing is inherited unasked


def test_a_killed_session_leaves_no_shared_memory_of_pythons(spawn: Spawn, tmp_path: Path) -> None:
    """vLLM's queues to the workers of tensor parallelism: they are removed by the resource tracker, which must outlive the others."""
    program = tmp_path / "engine.py"
    program.write_text(
        "from multiprocessing.shared_memory import SharedMemory\n"
        "import signal\n"
        "made = SharedMemory(create=True, size=4096)\n"
        "print(made.name, flush=True)\n"
        "signal.pause()\n"
    )
    process, child = spawn(f"exec {sys.executable} {program}")
    log = tmp_path / "out.log"
    eventually_now(lambda: log.read_text().endswith("\n"), "the segment is there")
    segment = Path("/dev/shm", log.read_text().strip())
    assert segment.exists()
    processes.signal_session(process, signal.SIGKILL)
    child.wait()
    eventually_now(lambda: not processes.members(process), "the tracker ended by itself")
    assert not segment.exists()


def test_a_tracker_that_is_left_alone_is_killed_too(spawn: Spawn) -> None:
    process, child = spawn(f"exec {sys.executable} -c 'import signal; \"multiprocessing.resource_tracker\"; signal.pause()'")
    processes.signal_session(process, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL


def test_a_log_is_continued_not_overwritten(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "out.log").write_text("before\n")
    _, child = spawn("echo after")
    child.wait()
    assert (tmp_path / "out.log").read_text() == "before\nafter\n"


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        processes.spawn([str(tmp_path / "python")], ENV, tmp_path / "log")


def test_members_are_the_whole_session_and_nobody_else(spawn: Spawn, tmp_path: Path) -> None:
    process, _, grandchild = with_child(spawn, tmp_path)
    other, _ = spawn("exec sleep 1000", tmp_path / "other.log")
    assert processes.members(process) == {process.pid, grandchild}
    assert processes.members(other) == {other.pid}
    assert processes.alive(process)


def test_an_orphan_is_still_a_member_when_its_leader_was_killed(spawn: Spawn, tmp_path: Path) -> None:
    process, child, orphan = with_child(spawn, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    child.wait()
    assert not processes.alive(process)
    assert processes.members(process) == {orphan}
    assert processes.signal_session(process, signal.SIGKILL) == 1
    eventually_now(lambda: not processes.members(process), "nobody is left")


def test_an_orphan_is_a_member_also_while_its_leader_is_a_zombie(spawn: Spawn, tmp_path: Path) -> None:
    process, _, orphan = with_child(spawn, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    eventually_now(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
    assert not processes.alive(process)
    assert processes.members(process) == {orphan}


def test_a_zombie_alone_is_nobody(spawn: Spawn) -> None:
    process, _ = spawn("exit 3")
    eventually_now(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
    assert not processes.alive(process)
    assert processes.members(process) == frozenset()
    assert processes.signal_session(process, signal.SIGTERM) == 0


def test_a_pid_with_another_create_time_is_a_stranger(spawn: Spawn) -> None:
    process, child = spawn("exec sleep 1000")
    stranger = Process(process.pid, process.create_time - 60)
    assert not processes.alive(stranger)
    assert processes.members(stranger) == frozenset()
    assert processes.signal_session(stranger, signal.SIGKILL) == 0
    assert child.poll() is None


def test_a_clock_that_is_set_makes_nobody_a_stranger(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil adds the boot time to what the kernel says, and that moves with the clock."""
    process, _ = spawn("exec sleep 1000")
    boot = psutil.boot_time()
    for name in ("psutil.boot_time", "psutil._pslinux.boot_time"):
        monkeypatch.setattr(name, lambda: boot + 3600)
    assert processes.alive(process)
    assert processes.members(process) == {process.pid}


def test_a_dead_pid_is_nobody(spawn: Spawn) -> None:
    process, child = spawn("exit 0")
    child.wait()
    assert not processes.alive(process)
    assert processes.members(process) == frozenset()


def test_a_name_with_brackets_and_no_letters_is_no_trouble(spawn: Spawn, tmp_path: Path) -> None:
    program = os.fsencode(tmp_path) + b"/a) Z \xff ("
    os.symlink("/bin/sleep", program)
    process, child = processes.spawn([os.fsdecode(program), "1000"], ENV, tmp_path / "log")
    try:
        eventually_now(lambda: Path(f"/proc/{process.pid}/comm").read_bytes().startswith(b"a) Z"), "its own name")
        assert processes.alive(process)
        assert processes.members(process) == {process.pid}
    finally:
        child.kill()
        child.wait()


def test_found_by_the_log_it_writes(spawn: Spawn, tmp_path: Path) -> None:
    process, _ = spawn("exec sleep 1000")
    assert processes.writing_to(tmp_path / "out.log") == process
    assert processes.writing_to(tmp_path / "other.log") is None
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert processes.writing_to(link / "out.log") == process  # /var/log may be a link


def test_an_orphan_is_found_by_the_log_and_its_dead_leader_named(spawn: Spawn, tmp_path: Path) -> None:
    process, child, orphan = with_child(spawn, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    child.wait()
    found = processes.writing_to(tmp_path / "out.log")
    assert found is not None
    assert found.pid == process.pid
    assert not processes.alive(found)
    assert processes.members(found) == {orphan}


@pytest.mark.asyncio
async def test_an_exit_is_noticed_at_once_and_once(spawn: Spawn) -> None:
    process, child = spawn("exec sleep 1000")
    noticed: list[int] = []
    processes.on_exit(process, lambda: noticed.append(1))
    await asyncio.sleep(0)
    assert noticed == []
    os.kill(process.pid, signal.SIGTERM)
    await eventually(lambda: noticed, "the exit")
    child.wait()
    for _ in range(3):
        await asyncio.sleep(0)
    assert noticed == [1]


@pytest.mark.asyncio
async def test_an_exit_of_nobodys_child_is_noticed(spawn: Spawn, tmp_path: Path) -> None:
    _, _, grandchild = with_child(spawn, tmp_path)
    noticed: list[int] = []
    processes.on_exit(Process(grandchild, 0.0), lambda: noticed.append(1))
    os.kill(grandchild, signal.SIGKILL)
    await eventually(lambda: noticed, "the exit")


@pytest.mark.asyncio
async def test_an_exit_of_before_is_noticed(spawn: Spawn) -> None:
    noticed: list[str] = []
    zombie, child = spawn("exit 0")
    eventually_now(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
    processes.on_exit(zombie, lambda: noticed.append("zombie"))
    await eventually(lambda: noticed == ["zombie"], "the zombie")
    child.wait()
    processes.on_exit(zombie, lambda: noticed.append("gone"))
    await eventually(lambda: noticed == ["zombie", "gone"], "the one that is gone")


@pytest.mark.asyncio
async def test_a_cancelled_notice_does_not_come_and_leaks_nothing(spawn: Spawn) -> None:
    process, child = spawn("exec sleep 1000")
    noticed: list[int] = []
    before = len(os.listdir("/proc/self/fd"))
    cancel = processes.on_exit(process, lambda: noticed.append(1))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    cancel()
    cancel()
    assert len(os.listdir("/proc/self/fd")) == before
    child.kill()
    child.wait()
    await asyncio.sleep(0)
    assert noticed == []


@pytest.mark.parametrize(
    ("code", "words"), [(None, "ended"), (0, "exited with code 0"), (2, "exited with code 2"), (-9, "was killed by SIGKILL")]
)
def test_how_it_ended(code: int | None, words: str) -> None:
    assert processes.how_it_ended(code) == words


def test_the_boot_has_a_name() -> None:
    assert processes.boot_id() == processes.boot_id() != ""
    with contextlib.suppress(FileNotFoundError):
        assert processes.boot_id() in Path("/proc/sys/kernel/random/boot_id").read_text()


def test_who_a_process_is_for_people(spawn: Spawn) -> None:
    process, child = spawn("exec sleep 1000")
    user = pwd.getpwuid(os.getuid()).pw_name
    eventually_now(lambda: processes.who(process.pid) == f"{user}: sleep (pid {process.pid})", "its user and program")
    child.kill()
    child.wait()
    assert processes.who(process.pid) == f"pid {process.pid}"  # over, or of another pid namespace


# ---- handles --------------------------------------------------------------------------------------------------------


def test_a_handle_waits_no_longer_than_it_is_told(spawn: Spawn) -> None:
    _, child = spawn("exec sleep 1000")
    with pytest.raises(TimeoutError, match="still runs after 0 s"):
        child.wait(0)
    child.kill()
    assert child.wait() == child.wait() == child.poll() == -signal.SIGKILL


def test_a_child_that_somebody_else_has_buried_is_over(spawn: Spawn) -> None:
    process, child = spawn("exit 3")
    forked = Child(process.pid)
    assert child.wait() == 3
    assert forked.poll() == 0  # as subprocess says then


def test_what_was_forked_for_us_must_lead_a_session_and_live(spawn: Spawn, tmp_path: Path) -> None:
    process, child, grandchild = with_child(spawn, tmp_path)
    found, handle = processes.forked(process.pid)
    assert found == process
    assert handle is not None
    with pytest.raises(ProcessLookupError, match="leads no session"):
        processes.forked(grandchild)
    os.kill(process.pid, signal.SIGKILL)
    child.wait()
    with pytest.raises(ProcessLookupError):
        processes.forked(process.pid)


def test_a_session_that_is_not_our_child_has_no_handle(spawn: Spawn, tmp_path: Path) -> None:
    _, _ = spawn("setsid sleep 1000 & echo $! >&1; wait")
    log = tmp_path / "out.log"
    eventually_now(lambda: log.read_text().endswith("\n"), "it is there")
    pid = int(log.read_text())
    eventually_now(lambda: os.getsid(pid) == pid, "of its own session")
    found, handle = processes.forked(pid)
    assert (found.pid, handle) == (pid, None)
    os.kill(pid, signal.SIGKILL)


def test_host_memory_of_a_process(spawn: Spawn) -> None:
    process, child = spawn("exec sleep 1000")
    memory = processes.memory(process.pid)
    assert memory is not None
    assert 0 < memory[1] <= memory[0] < 100 << 20
    child.kill()
    child.wait()
    assert processes.memory(process.pid) is None
