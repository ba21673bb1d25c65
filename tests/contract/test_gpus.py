"""What the loop may rely on of GPUs: the same tests on the fake world's, the simulated ones, and NVML's process with a fake pynvml."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from orchestrator.control.ports import Gpus
from orchestrator.drivers import processes
from orchestrator.drivers.nvml import Nvml
from orchestrator.drivers.simgpu import SimGpus
from orchestrator.policy.instance import Launch
from orchestrator.policy.units import GIB
from tests.control.fakes import BASE, CARD, FakeEngine, FakeGpus, spec
from tests.support.eventually import eventually_now


class Rig(Protocol):
    """`hold` makes a process that holds memory of a card and gives its pid; `end` ends it."""

    gpus: Gpus

    def hold(self, index: int, size_bytes: int) -> int: ...

    def end(self, pid: int) -> None: ...

    def fail(self) -> None: ...

    def close(self) -> None: ...


class Fake:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = FakeGpus(2)

    def hold(self, index: int, size_bytes: int) -> int:
        pid = 100 + len(self.gpus.engines)
        launch = Launch(str(pid), "ipc", spec(), (f"GPU-{index}",), 0, 0, 0)
        self.gpus.engines[launch.id] = FakeEngine(launch, pid, 0.0, fixed_bytes=size_bytes)
        return pid

    def end(self, pid: int) -> None:
        self.gpus.engines[str(pid)].gone = True

    def fail(self) -> None:
        self.gpus.error = OSError("NVML: gone")

    def close(self) -> None:
        pass


class Simulated:
    gpus: Gpus

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = SimGpus(tmp_path / "gpu", 2, CARD)
        self.folder = tmp_path / "gpu"
        self._log = tmp_path / "log"
        self._children: dict[int, processes.Child] = {}

    def hold(self, index: int, size_bytes: int) -> int:
        process, child = processes.spawn(["sleep", "1000"], {"PATH": "/usr/bin:/bin"}, self._log)
        self._children[process.pid] = child
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (self.folder / f"held/GPU-sim-{index}/{process.pid}.{started}").write_bytes(struct.pack("=q", size_bytes))
        return process.pid

    def end(self, pid: int) -> None:
        self._children[pid].kill()
        self._children.pop(pid).wait()

    def fail(self) -> None:
        (self.folder / "gpus.json").unlink()

    def close(self) -> None:
        for pid in list(self._children):
            self.end(pid)


class OfProcess(Simulated):
    """The cards of a SimGpus, read through NVML's process."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(tmp_path, monkeypatch)
        monkeypatch.setenv("FAKE_NVML", str(self.folder))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support/fake_nvml"))
        self.gpus = self.nvml = Nvml()

    def close(self) -> None:
        self.nvml.close()
        super().close()


@pytest.fixture(params=[Fake, Simulated, OfProcess])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    make: Callable[[Path, pytest.MonkeyPatch], Rig] = request.param
    made = make(tmp_path, monkeypatch)
    yield made
    made.close()


def test_cards_have_a_uuid_an_index_and_sizes(rig: Rig) -> None:
    first, second = rig.gpus.read()
    assert (first.index, second.index) == (0, 1)
    assert first.uuid != second.uuid
    for card in (first, second):
        assert (card.total_bytes, card.used_bytes) == (CARD, BASE)
        assert (card.processes, card.error) == ({}, None)


def test_what_a_process_holds_is_its_own_and_comes_back_when_it_ends(rig: Rig) -> None:
    one, two = rig.hold(0, 3 * GIB), rig.hold(0, 5 * GIB)
    other = rig.hold(1, 1 * GIB)
    first, second = rig.gpus.read()
    assert first.processes == {one: 3 * GIB, two: 5 * GIB}
    assert first.free_bytes == CARD - BASE - 8 * GIB
    assert second.processes == {other: 1 * GIB}
    rig.end(two)
    eventually_now(lambda: rig.gpus.read()[0].free_bytes == CARD - BASE - 3 * GIB, "its memory is back")
    assert set(rig.gpus.read()[0].processes) == {one}


def test_free_is_never_below_nothing(rig: Rig) -> None:
    rig.hold(0, 2 * CARD)
    assert rig.gpus.read()[0].free_bytes == 0


def test_a_source_that_answers_nothing_raises_oserror(rig: Rig) -> None:
    rig.fail()
    with pytest.raises(OSError, match=r".+"):
        rig.gpus.read()
