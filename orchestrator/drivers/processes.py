"""Processes by (pid, create time) and by session. A pid alone is never believed: it may belong to a stranger by now.

Each engine is its own session, so "is any of it left" and "signal all of it" need no process tree: an EngineCore whose parent
was killed still has the session's id. Its new parent is the daemon (adopt_orphans), which buries it: no zombie stays.
"""

import asyncio
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ENGINE_OOM_SCORE = 500  # when the host runs out of memory an engine goes before the daemon does
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
DEAD = ("Z", "X")  # a zombie does not run
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Process:
    """The leader of a session: pid == session id. `create_time`: seconds from the machine's boot to its start.

    Not psutil's, which adds the boot time: that moves when the clock is set, and a living engine would become a stranger.
    """

    pid: int
    create_time: float


class Child:
    """A child of ours, started (spawn) or forked for us (forked): its exit code, which a parent alone learns."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None
        _held[pid] = self

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                self._code = 0  # somebody else has waited for it: it is over, and this is what subprocess says then too
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code once it has ended; blocks until then. Raises TimeoutError."""
        if self.poll() is None:
            fd = os.pidfd_open(self._pid)
            try:
                ended = select.poll()
                ended.register(fd, select.POLLIN)
                if not ended.poll(None if timeout_s is None else timeout_s * 1000):
                    raise TimeoutError(f"pid {self._pid} still runs after {timeout_s} s")
            finally:
                os.close(fd)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:  # and so the pid is still its own
            os.kill(self._pid, signal.SIGKILL)


_held: "weakref.WeakValueDictionary[int, Child]" = weakref.WeakValueDictionary()


def spawn(argv: Sequence[str], env: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()) -> tuple[Process, Child]:
    """Start a session. Its output goes to a file, never to a pipe: a pipe's other end would die with the daemon."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        started = subprocess.Popen(
            list(argv), env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd="/",
            pass_fds=pass_fds,
        )  # fmt: skip
    started.returncode = 0  # subprocess would wait for one that is dropped, or warn of it: that is Child's to do, and then reap's
    found = _stat(started.pid)
    assert found is not None  # ours, and not waited for
    _expendable(started.pid)
    return Process(started.pid, found[1]), Child(started.pid)


def forked(pid: int) -> tuple[Process, Child | None]:
    """A session that another process started for us, and its handle if it is our child (adopt_orphans). Raises ProcessLookupError."""
    found = _stat(pid)
    if found is None or os.getsid(pid) != pid:
        raise ProcessLookupError(f"pid {pid} leads no session")
    _expendable(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        return Process(pid, found[1]), Child(pid) if psutil.Process(pid).ppid() == os.getpid() else None
    raise ProcessLookupError(f"pid {pid} has ended")


def adopt_orphans(from_now_on: bool = True) -> None:
    """A descendant of ours whose parent ends becomes our child, not init's: then reap() must be called now and then. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, int(from_now_on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def reap() -> None:
    """Bury dead children that nobody holds: what is left of engines whose own parent died. Costs a system call where there are none.

    Those of our own session are left alone: whoever started them waits for them.
    """
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
    except ChildProcessError:
        return
    for child in psutil.Process().children():
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if child.pid not in _held and os.getsid(child.pid) != os.getsid(0):
                os.waitpid(child.pid, os.WNOHANG)


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
    """Send to every member; returns how many there were.

    SIGKILL spares Python's resource trackers until nobody else is left: one ends by itself when the last process that it serves is
    dead, and removes what those left in /dev/shm (vLLM's queues to its workers, which nobody else could know).
    """
    found = members(process)
    spared = {pid for pid in found if _tracks_resources(pid)} if number is signal.SIGKILL else set()
    for pid in found - spared or found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return len(found)


def _tracks_resources(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def memory(pid: int) -> tuple[int, int] | None:
    """Host memory now, in bytes: resident, and its share of what it has in common with others (fork leaves nearly all in common)."""
    try:
        found = psutil.Process(pid).memory_full_info()
        return found.rss, found.pss
    except psutil.Error:
        return None


def who(pid: int) -> str:
    """A process for people: its user and program, as far as they may be known (not of another pid namespace)."""
    try:
        found = psutil.Process(pid)
        return f"{found.username()}: {found.name()} (pid {pid})"
    except (psutil.Error, OSError, KeyError):
        return f"pid {pid}"


def who_and_how(pid: int) -> str:
    """A process that should have ended, and why it may not: the kernel's letter for its state, and where it waits in the kernel."""
    found = _stat(pid)
    waits = ""
    with contextlib.suppress(OSError):  # for root alone
        waits = Path(f"/proc/{pid}/wchan").read_text().strip("0")
    return f"pid {pid} (state {found[0] if found else '?'}{f', in {waits}' if waits else ''})"


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


def _expendable(pid: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(ENGINE_OOM_SCORE))


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


def host_bytes() -> int:
    """Memory of this machine."""
    return int(psutil.virtual_memory().total)
