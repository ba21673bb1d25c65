"""The watch ends an experiment whose figures would be worth nothing: others took memory, or the daemon is another one."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from orchestrator.experiments.trouble import Trouble
from orchestrator.experiments.watch import Watch
from orchestrator.policy.snapshot import GpuReading

GIB, MIB = 1 << 30, 1 << 20
DEADLINE_S = 20.0


class Card:
    """A GPU of which one process holds what the test says: this one, where no other is named."""

    def __init__(self, holder: int | None = None) -> None:
        self.held, self.holder = GIB, holder or os.getpid()

    def read(self) -> Sequence[GpuReading]:
        return [GpuReading("GPU-0", 0, "a card", 80 * GIB, 80 * GIB - self.held, {self.holder: self.held})]

    def close(self) -> None:
        pass


class Told:
    """What the daemon says; `pid`: its own, `engine`: the leader of its one engine."""

    def __init__(self) -> None:
        self.pid, self.engine = 1, 0

    def models(self) -> dict[str, Any]:
        pool = {"used_bytes": 100 * MIB, "prealloc_bytes": 28 * MIB}
        return {"qwen": {"state": "ready", "pool": pool, "engine": {"pid": self.engine, "gpu_bytes": GIB}}} if self.engine else {}


@pytest.fixture
def leader() -> Iterator[int]:
    """A process in a session of its own, as an engine is. This one's may be led from outside its PID namespace: its id is 0 then."""
    with subprocess.Popen(["sleep", "infinity"], start_new_session=True) as process:
        yield process.pid
        process.kill()


def watching(card: Card, told: Told) -> Watch:
    return Watch(card, ["GPU-0"], told.models, lambda: told.pid, 512 * MIB)


def test_memory_that_others_take_ends_it_and_says_whose_it_is() -> None:
    card = Card()
    with watching(card, Told()) as watch:
        card.held += GIB
        with pytest.raises(Trouble, match=f"others took 1024MiB.*pid {os.getpid()}") as found:
            watch.until(lambda: False, DEADLINE_S)
    assert "--foreign-tolerance 1024MiB" in found.value.lines[0]


def test_memory_of_an_engine_is_nobody_elses_and_is_divided(leader: int) -> None:
    card, told = Card(leader), Told()
    told.engine = leader
    with watching(card, told) as watch:
        card.held += 4 * GIB
        assert watch.until(lambda: watch.used_bytes == 5 * GIB and len(watch.samples) > 8, DEADLINE_S)
    held = watch.samples[-1].models["qwen"]
    assert (watch.samples[-1].foreign_bytes, held.kv_bytes, held.fixed_bytes) == (0, 128 * MIB, 5 * GIB - 128 * MIB)


def test_a_static_engine_is_ours_too(leader: int) -> None:
    card = Card(leader)
    with watching(card, Told()) as watch:
        watch.static["qwen"] = leader
        assert watch.until(lambda: watch.samples[-1].foreign_bytes == 0, DEADLINE_S)
    assert watch.samples[-1].models["qwen"].fixed_bytes == GIB


def test_another_daemon_ends_it() -> None:
    told = Told()
    with watching(Card(), told) as watch:
        told.pid = 2
        with pytest.raises(Trouble, match=r"restarted in the middle \(pid 1 before, 2 now"):
            watch.until(lambda: False, DEADLINE_S)


def test_memory_at_rest_is_waited_for() -> None:
    card = Card()
    with watching(card, Told()) as watch:
        watch.settle(DEADLINE_S, 0.3)
        assert watch.now_s() < DEADLINE_S / 2
