"""The process that NVML runs in, with a module `pynvml` that hangs, crashes and lies: what is said, what is left, and that it heals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.drivers import nvml as driver
from orchestrator.drivers import processes
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import GIB
from tests.support.eventually import eventually_now

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests/support/fake_nvml"


class Driver:
    """`nvml` reads two cards of 16 GiB, as the file `fault` allows it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        SimGpus(folder, 2, 16 * GIB)
        monkeypatch.setenv("PYTHONPATH", str(FAKE))
        monkeypatch.setenv("FAKE_NVML", str(folder))
        monkeypatch.setattr(driver, "FIRST_WAIT_S", 0.0)
        self.log = folder / "nvml.log"
        self.nvml = Nvml(self.log)

    def fault(self, what: str) -> None:
        (self.folder / "fault").write_text(what)

    def refusal(self) -> str:
        with pytest.raises(OSError, match=r"^NVML: ") as error:
            self.nvml.read()
        return str(error.value)

    def heals(self) -> list[GpuReading]:
        self.fault("")

        def read() -> list[GpuReading]:
            try:
                return list(self.nvml.read())
            except OSError:
                return []

        found = eventually_now(read, "it answers again")
        assert [(card.uuid, card.error) for card in found] == [("GPU-sim-0", None), ("GPU-sim-1", None)]
        return found

    def pids(self) -> list[int]:
        """Of all processes that there were, the newest last."""
        return [int(word) for word in (self.folder / "pids").read_text().split()]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver(tmp_path, monkeypatch)
    yield made
    made.nvml.close()
    for pid in made.pids():
        eventually_now(lambda pid=pid: gone(pid), f"{pid} is gone")  # type: ignore[misc]


def gone(pid: int) -> bool:
    processes.reap()
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die SIGSEGV", "its process was killed by SIGSEGV"),
        ("die SIGKILL", "its process was killed by SIGKILL"),
        ("exit 3", "its process exited with code 3"),
        ("raise", "its process exited with code 1: RuntimeError: what nobody thought of"),
        ("answer no JSON", "its process answered nonsense: b'no JSON"),
        ("answer []", "nonsense"),
        ('answer {"cards": 3}', "nonsense"),
        ('answer {"cards": [[0, "u", "n", 5, 6, [], null]]}', "nonsense"),  # more free than there is
        ('answer {"cards": [[0, "u", "n", -5, -6, [], null]]}', "nonsense"),
        ('answer {"cards": [[0, null, "n", 5, 5, [], null]]}', "nonsense"),
        ('answer {"cards": [[0, "u", "n", 5, 5, [["x", 1]], null]]}', "nonsense"),
        ("code 18", "RM has detected an NVML/RM version mismatch.: the driver was upgraded under a running kernel module: reboot"),
        ("code 4", "Insufficient Permissions: this user may not open /dev/nvidia*: add it to the groups video and render"),
        ("code 9", "Driver Not Loaded: load it with `nvidia-modprobe`"),
        ("code 999", "Unknown Error"),
    ],
)
def test_it_says_what_went_wrong_and_heals(broken: Driver, fault: str, said: str) -> None:
    (first,) = broken.pids()
    broken.fault(fault)
    assert said in broken.refusal()
    assert said in broken.refusal()  # that of the next process
    broken.heals()
    assert first not in (broken.pids()[-1], os.getpid())
    assert gone(first)


def test_one_that_hangs_is_killed_and_another_one_started(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.2)
    broken.nvml.read()  # the first answer came with another patience
    broken.fault("hang")
    assert broken.refusal() == "NVML: the driver has not answered for 0.2 s; its process was killed"
    broken.heals()


def test_one_that_hangs_while_it_begins(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "START_S", 1.0)
    broken.fault("exit 1")
    broken.refusal()
    broken.fault("hang init")
    assert broken.refusal() == "NVML: the driver has not answered for 1 s; its process was killed"
    monkeypatch.setattr(driver, "START_S", 30.0)
    broken.heals()


def test_one_that_was_stopped(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.2)
    broken.nvml.read()
    os.kill(broken.pids()[-1], signal.SIGSTOP)
    assert "has not answered for 0.2 s" in broken.refusal()
    broken.heals()


def test_one_that_can_not_be_killed_is_alone_of_its_kind(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the kernel's state D: then the next one would hang there, too."""
    (pid,) = broken.pids()
    monkeypatch.setattr(driver, "ANSWER_S", 0.2)
    broken.nvml.read()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(processes.Child, "kill", lambda self: None)
    monkeypatch.setattr(driver, "GONE_S", 0.01)
    broken.refusal()
    assert broken.refusal().startswith(f"NVML: process {pid} hangs in the driver and can not be killed")
    assert broken.pids() == [pid]
    monkeypatch.undo()
    os.kill(pid, signal.SIGKILL)
    broken.nvml._retry_at = 0.0
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_NVML", str(broken.folder))
    broken.heals()


def test_it_is_started_again_later_each_time_and_a_stable_run_forgives(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "FIRST_WAIT_S", 1.0)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    broken.fault("exit 3")
    waits = []
    for _ in range(8):
        assert "code 3" in broken.refusal()
        started = len(broken.pids())
        waits.append(broken.nvml._retry_at - now[0])
        now[0] = broken.nvml._retry_at - 0.001
        assert "code 3" in broken.refusal()  # said all the time, and nothing is started
        assert len(broken.pids()) == started
        now[0] += 0.002
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60])
    for _ in range(1100):  # a day of them
        broken.nvml._later("still")
    assert broken.nvml._retry_at - now[0] == pytest.approx(60)
    now[0] = broken.nvml._retry_at + 0.001
    broken.fault("")
    broken.nvml.read()
    now[0] += driver.STABLE_S + 1
    broken.fault("exit 3")
    broken.refusal()
    assert broken.nvml._retry_at - now[0] == pytest.approx(1)


def test_a_lost_card_is_what_it_was_with_the_reason_and_the_other_goes_on(broken: Driver) -> None:
    (whole, other) = broken.nvml.read()
    broken.fault("lost 0")
    lost, fresh = broken.nvml.read()
    assert (lost.uuid, lost.free_bytes) == (whole.uuid, whole.free_bytes)
    assert lost.error == "NVML: GPU is lost: it fell off the bus: `dmesg` has its Xid; reboot"
    assert fresh == other
    assert len(broken.pids()) == 1


def test_a_card_that_a_new_process_finds_lost_keeps_its_reason(broken: Driver) -> None:
    broken.fault("die SIGSEGV")
    broken.refusal()
    broken.fault("lost 0")
    lost, fresh = broken.nvml.read()
    assert (lost.uuid, lost.error, fresh.error) == (
        "GPU-sim-0",
        "NVML: GPU is lost: it fell off the bus: `dmesg` has its Xid; reboot",
        None,
    )


def test_a_card_that_is_back_is_found_by_a_new_process(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken.fault("lost 1")
    broken.nvml.read()
    broken.fault("")
    assert broken.nvml.read()[1].error  # NVML itself does not see it again
    monkeypatch.setattr(driver, "RENEW_S", 0.0)
    broken.nvml.read()
    broken.heals()
    assert len(broken.pids()) == 2


def test_what_can_not_be_started_is_said(broken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken.fault("exit 1")
    broken.refusal()
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert "NVML: its process can not be started: [Errno 2]" in broken.refusal()
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_NVML", str(broken.folder))
    broken.nvml._retry_at = 0.0
    broken.heals()


def test_a_log_that_can_not_be_written_is_no_reason_not_to_look(broken: Driver, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nvml = Nvml(tmp_path / "file/nvml.log")
    assert len(nvml.read()) == 2
    nvml.close()


def test_the_log_holds_the_last_ones_words_alone(broken: Driver) -> None:
    for _ in range(3):
        broken.fault("die SIGSEGV")
        assert str(broken.log) in broken.refusal()
    assert broken.log.read_text().count("Fatal Python error: Segmentation fault") == 1
    assert "nvmlDeviceGetCount" in broken.log.read_text()


def test_where_there_is_no_driver_the_constructor_says_so(broken: Driver, tmp_path: Path) -> None:
    for code, said in ((12, "no NVIDIA driver on this machine"), (18, "reboot")):
        broken.fault(f"code {code}")
        with pytest.raises(OSError, match=said):
            Nvml()


# ---- its life -------------------------------------------------------------------------------------------------------


def test_reaping_takes_nothing_away_and_leaves_no_zombie(broken: Driver) -> None:
    (pid,) = broken.pids()
    os.kill(pid, signal.SIGSEGV)
    eventually_now(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "it has ended")
    processes.reap()
    assert "was killed by SIGSEGV" in broken.refusal()
    broken.heals()
    assert not psutil.pid_exists(pid)


def test_it_has_a_session_of_its_own_and_signals_for_all_pass_it_by(broken: Driver) -> None:
    (pid,) = broken.pids()
    assert os.getsid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert len(broken.nvml.read()) == 2
    assert broken.pids() == [pid]


PARENT = """
import os, signal, sys
from pathlib import Path
from orchestrator.drivers.nvml import Nvml
nvml = Nvml()
assert "pynvml" not in sys.modules
(pid,) = Path(os.environ["FAKE_NVML"], "pids").read_text().split()
how = sys.argv[1]
if how == "stopped":
    os.kill(int(pid), signal.SIGSTOP)
print(pid, flush=True)
if how != "returns":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["returns", "killed", "stopped"])
def test_it_ends_with_the_daemon_however_that_ends(tmp_path: Path, how: str) -> None:
    SimGpus(tmp_path, 1, GIB)
    env = os.environ | {"PYTHONPATH": f"{FAKE}:{ROOT}", "FAKE_NVML": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PARENT, how], env=env, capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    eventually_now(lambda: gone(pid), "it has ended")


def test_it_starts_with_nothing_of_ours(broken: Driver) -> None:
    (pid,) = broken.pids()
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "pydantic" not in maps
    assert psutil.Process(pid).num_threads() == 1
    assert psutil.Process(pid).memory_info().rss < 64 << 20
