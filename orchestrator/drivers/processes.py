"""Processes by (pid, create time) and by session. A pid alone is never believed: it may belong to a stranger by now.

Each engine is its own session, so "is any of it left" and "signal all of it" need no process tree: an EngineCore whose parent
was killed (its parent is init then) still has the session's id.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ENGINE_OOM_SCORE = 500  # when the host runs out of memory an engine goes before the daemon does
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
DEAD = ("Z", "X")  # a zombie does not run


@dataclass(frozen=True, slots=True)
class Process:
    """The leader of a session: pid == session id. `create_time`: seconds from the machine's boot to its start.

    Not psutil's, which adds the boot time: that moves when the clock is set, and a living engine would become a stranger.
    """

    pid: int
    create_time: float


def spawn(argv: Sequence[str], env: Mapping[str, str], log: Path) -> tuple[Process, "subprocess.Popen[bytes]"]:
    """Start a session. Its output goes to a file, never to a pipe: a pipe's other end would die with the daemon."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        child = subprocess.Popen(
            list(argv), env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd="/"
        )
    with contextlib.suppress(OSError):
        Path(f"/proc/{child.pid}/oom_score_adj").write_text(str(ENGINE_OOM_SCORE))
    found = _stat(child.pid)
    assert found is not None  # ours, and not waited for
    return Process(child.pid, found[1]), child


def alive(process: Process) -> bool:
    """Runs, and is the one we mean. A zombie does not run."""
    found = _stat(process.pid)
    return found is not None and found[1] == process.create_time and found[0] not in DEAD


def members(process: Process) -> frozenset[int]:
    """Every living process of the session, the leader included."""
    leader = _stat(process.pid)
    if leader is not None and leader[1] != process.create_time:
        return frozenset()  # the pid is a stranger's now, so nobody of our session was left when it was given away
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == process.pid and (stat := _stat(pid)) is not None and stat[0] not in DEAD:
                found.add(pid)
    return frozenset(found)


def writing_to(log: Path) -> Process | None:
    """The session leader whose output goes to `log`, a file that one launch alone has: how a process is found whose pid nobody kept.

    A leader that is dead is named too, with create time 0: members() finds whom it left.
    """
    path = os.path.realpath(log)
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/1") == path:
                leader = os.getsid(pid)
                found = _stat(leader)
                return Process(leader, found[1] if found else 0.0)
    return None


def signal_session(process: Process, number: signal.Signals) -> int:
    """Send to every member; returns how many there were."""
    found = members(process)
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return len(found)


def who(pid: int) -> str:
    """A process for people: its user and program, as far as they may be known (not of another pid namespace)."""
    try:
        found = psutil.Process(pid)
        return f"{found.username()}: {found.name()} (pid {pid})"
    except (psutil.Error, OSError, KeyError):
        return f"pid {pid}"


def on_exit(process: Process, notify: Callable[[], None]) -> Callable[[], None]:
    """Call `notify` once when the process ends, child or not. Returns what cancels it. Fires at once if it has ended already."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        loop.call_soon(notify)
        return lambda: None

    def done() -> None:
        cancel()
        notify()

    def cancel() -> None:
        if fd in watched:
            watched.discard(fd)
            loop.remove_reader(fd)
            os.close(fd)

    watched = {fd}
    loop.add_reader(fd, done)
    return cancel


def boot_id() -> str:
    """Another one after each boot: pids and create times of an earlier boot mean nobody."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, float] | None:
    """State and create time of a process, None where there is none: fields 3 and 22 of /proc/<pid>/stat."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19]) / CLOCK_TICKS


def how_it_ended(code: int | None) -> str:
    """A child's return code in words; None for one that was adopted: only a parent learns it."""
    if code is None:
        return "ended"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"
