"""Looks at the GPUs five times a second, past the daemon, and beside that at what the daemon says of its engines.

Memory is the driver's word (drivers/nvml.py, or the folder of simulated cards): the daemon's word is what is measured. Two threads, so
that a daemon that hangs leaves no gap in the memory. Whatever would make the figures worthless is kept as `trouble`, and raised by
check(): foreign memory that grew, a daemon that was restarted.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from orchestrator.drivers import processes
from orchestrator.drivers.nvml import Nvml
from orchestrator.engine.simulator.gpu import SimGpu, read_cards
from orchestrator.experiments.samples import Held, Sample
from orchestrator.experiments.trouble import Trouble
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.units import MIB, show_bytes

PERIOD_S = 0.2
RESTING_BYTES = 16 * MIB  # less than this up and down is no movement
SURE_LOOKS = 5  # an engine may be seen to hold memory before the daemon has said that it is one


class Cards(Protocol):
    """Raises OSError with the driver's words."""

    def read(self) -> Sequence[GpuReading]: ...

    def close(self) -> None: ...


class SimulatedCards:
    """Those that a daemon made in `folder`; SimGpus would make them anew. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._gpus = [SimGpu(folder, card) for card in read_cards(folder)]

    def read(self) -> Sequence[GpuReading]:
        found = []
        for index, gpu in enumerate(self._gpus):
            held, card = gpu.holders(), gpu.card
            found.append(
                GpuReading(card.uuid, index, card.name, card.total_bytes, card.total_bytes - card.base_bytes - sum(held.values()), held)
            )
        return found

    def close(self) -> None:
        """There is nothing to close."""


def cards(simulated: Path | None) -> Cards:
    """Raises OSError. `simulated`: the folder of the simulated cards, None for real ones."""
    return Nvml() if simulated is None else SimulatedCards(simulated)


class Watch:
    """Samples of the GPUs `uuids` for as long as the `with` lasts. `models`: asks the daemon, its models by name; `pid`: of the daemon.

    `static`: leaders of sessions that are ours, by model; add to it what is started. Memory of other processes may grow by
    `tolerated_bytes`.
    """

    def __init__(
        self,
        source: Cards,
        uuids: Collection[str],
        models: Callable[[], Mapping[str, Any]],
        pid: Callable[[], int],
        tolerated_bytes: int,
    ) -> None:
        self.samples: list[Sample] = []
        self.marks: list[tuple[float, str]] = []
        self.static: dict[str, int] = {}
        self.began = time.monotonic()
        self._source, self._uuids, self._models, self._pid = source, frozenset(uuids), models, pid
        self._tolerated = tolerated_bytes
        self._told: Mapping[str, Any] = models()
        self._daemon = pid()
        self._foreign: int | None = None  # the least so far
        self._grown = 0  # looks in a row in which it was more than that
        self._trouble: Trouble | None = None
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._every, args=(look,), daemon=True) for look in (self._look, self._ask)]

    def __enter__(self) -> Self:
        self._look()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10.0)

    def now_s(self) -> float:
        return time.monotonic() - self.began

    def mark(self, what: str) -> None:
        self.marks.append((self.now_s(), what))

    @property
    def used_bytes(self) -> int:
        return self.samples[-1].used_bytes

    def between(self, begin_s: float, end_s: float) -> list[Sample]:
        return [sample for sample in self.samples if begin_s <= sample.at_s <= end_s]

    def check(self) -> None:
        """Raises Trouble where what is measured from here on is worth nothing."""
        if self._trouble is not None:
            raise self._trouble

    def rest(self, seconds: float) -> None:
        """A pause in which trouble is noticed."""
        self.until(lambda: False, seconds)

    def until(self, probe: Callable[[], bool], most_s: float) -> bool:
        """Whether it came true in time. Raises Trouble."""
        end = time.monotonic() + most_s
        while not probe():
            self.check()
            if (left := end - time.monotonic()) <= 0:
                return False
            time.sleep(min(left, PERIOD_S / 2))
        return True

    def settle(self, most_s: float, still_s: float) -> None:
        """Until the use has not fallen for `still_s`, `most_s` at most: engines give back what they do not need when they are idle."""
        least, fell = self.used_bytes, time.monotonic()

        def still() -> bool:
            nonlocal least, fell
            if self.used_bytes < least - RESTING_BYTES:
                least, fell = self.used_bytes, time.monotonic()
            return time.monotonic() - fell >= still_s

        self.until(still, most_s)

    # ---- its threads ------------------------------------------------------------------------------------------------

    def _every(self, look: Callable[[], None]) -> None:
        while not self._stop.wait(PERIOD_S):
            with contextlib.suppress(Exception):  # one look that fails is a gap in the picture: a daemon that restarts, a driver that hangs
                look()

    def _look(self) -> None:
        readings = [one for one in self._source.read() if one.uuid in self._uuids and not one.error]
        if len(readings) < len(self._uuids):
            return
        ours = {int(m["engine"]["pid"]) for m in self._told.values() if m.get("engine") and m["engine"].get("pid")} | {
            *self.static.values()
        }
        strangers, mine = self._divide(readings, ours)
        models = {name: _held(model, mine) for name, model in self._told.items()}
        for name, leader in self.static.items():
            models[name] = Held(mine.get(leader, 0), 0, "static")
        foreign = None if strangers is None else sum(strangers.values())
        self.samples.append(Sample(self.now_s(), sum(one.used_bytes for one in readings), foreign, models))
        if strangers is not None:
            self._mind(strangers)

    def _divide(self, readings: Sequence[GpuReading], ours: Collection[int]) -> tuple[dict[int, int] | None, dict[int, int]]:
        """Bytes of strangers by pid, None where one is named that can not be seen here; and ours by the leader of their session."""
        strangers: dict[int, int] | None = {}
        mine: dict[int, int] = {}
        for pid, size in ((pid, size) for one in readings for pid, size in one.processes.items()):
            try:
                leader = os.getsid(pid)
            except OSError:  # it has just ended, or is of another PID namespace
                if not Path(f"/proc/{pid}").exists() and pid not in ours:
                    strangers = None
                continue
            if leader in ours:
                mine[leader] = mine.get(leader, 0) + size
            elif strangers is not None:
                strangers[pid] = strangers.get(pid, 0) + size
        return strangers, mine

    def _mind(self, strangers: Mapping[int, int]) -> None:
        foreign = sum(strangers.values())
        if self._foreign is None or foreign < self._foreign:
            self._foreign = foreign
        self._grown = self._grown + 1 if foreign > self._foreign + self._tolerated else 0
        if self._grown < SURE_LOOKS or self._trouble is not None:
            return
        who = ", ".join(f"{processes.who(pid)} {show_bytes(size)}" for pid, size in sorted(strangers.items(), key=lambda one: -one[1])[:3])
        grown = show_bytes(foreign - self._foreign)
        self._trouble = Trouble(
            f"others took {grown} of the GPU meanwhile, so the figures would be theirs, too: {who}",
            [f"run it again when they are done, or allow it with --foreign-tolerance {grown}"],
        )

    def _ask(self) -> None:
        self._told = self._models()
        pid = self._pid()
        if pid != self._daemon and self._trouble is None:
            self._trouble = Trouble(restarted(self._daemon, pid))


def restarted(before: int, now: int) -> str:
    return f"the daemon was restarted in the middle (pid {before} before, {now} now): run it again"


def _held(model: Mapping[str, Any], mine: Mapping[int, int]) -> Held:
    """The driver's word on its session, where it names processes; else the daemon's. KV is the daemon's word, up to half a second old."""
    pool, engine = model.get("pool") or {}, model.get("engine") or {}
    kv = int(pool.get("used_bytes", 0)) + int(pool.get("prealloc_bytes", 0))
    total = mine.get(int(engine.get("pid") or 0), int(engine.get("gpu_bytes", 0)))
    return Held(max(0, total - kv), min(kv, total), str(model.get("state")))
