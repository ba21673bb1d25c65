"""The only place that reads the world: ports -> one frozen Snapshot.

NVML is read in a thread and between two looks at the segments; of the two, the smaller use counts, so that pool memory is
never taken for larger than it is. A driver that fails or hangs leaves the last reading, marked with why it is old, and holds up one
look, not those that follow; a segment that vanishes leaves the last one, marked as lost, because its engine goes on with it.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from orchestrator.control.ports import Engines, Gpus
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, Snapshot, TrafficSeen

log = logging.getLogger(__name__)

GPU_TIMEOUT_S = 2.0  # a read takes 0.2 ms on a healthy card
T = TypeVar("T")


class Observer:
    def __init__(self, gpus: Gpus, engines: Engines, traffic: Callable[[], Mapping[str, TrafficSeen]], clock: Callable[[], float]) -> None:
        self._engines, self._traffic, self._clock = engines, traffic, clock
        self._gpus = _Worker(gpus.read)
        self._last: dict[str, GpuReading] = {}
        self._reading: asyncio.Future[Sequence[GpuReading]] | None = None  # at most one read is under way, however long it hangs
        self._patience_s = GPU_TIMEOUT_S
        self._seen: Mapping[str, EngineSeen] = {}

    async def look(self) -> Snapshot:
        before = self._engines.segments()
        await self._read_gpus()
        self._seen = {key: self._steady(seen, before.get(key)) for key, seen in self._engines.look().items()}
        return Snapshot(now=self._clock(), gpus=dict(self._last), engines=self._seen, traffic=self._traffic())

    def _steady(self, seen: EngineSeen, before: Segment | None) -> EngineSeen:
        """With the segment that counts: the one of the two looks that shows less in use; where it was lost, that of the last look."""
        now = seen.segment
        if now is None:
            if not seen.ready or seen.gone:
                return seen
            last = self._seen.get(seen.launch_id)
            return replace(seen, segment=last.segment if last else None, segment_lost=True)
        if before is None or before.mapped_bytes >= now.mapped_bytes:
            return seen
        return replace(seen, segment=replace(now, used_bytes=before.used_bytes, prealloc_bytes=before.prealloc_bytes))

    async def _read_gpus(self) -> None:
        before = self._last
        if self._reading is None:
            self._reading, self._patience_s = self._gpus.ask(), GPU_TIMEOUT_S
        await asyncio.wait([self._reading], timeout=self._patience_s)
        if self._reading.done():
            read, self._reading = self._reading, None  # whatever it brought, the next look reads afresh
            self._take(read)
        else:
            self._patience_s = 0.0
            late = f"the driver has not answered for {GPU_TIMEOUT_S:.0f}s"  # while it is started anew, why it had to be says more
            self._last = {uuid: replace(reading, error=reading.error or late) for uuid, reading in before.items()}
        for uuid, reading in self._last.items():
            _tell(before.get(uuid), reading)

    def _take(self, read: "asyncio.Future[Sequence[GpuReading]]") -> None:
        try:
            readings = read.result()
        except OSError as error:
            self._last = {uuid: replace(reading, error=str(error)) for uuid, reading in self._last.items()}
            return
        now = self._clock()
        missing = {uuid: replace(old, error="the driver does not list it any more") for uuid, old in self._last.items()}
        self._last = missing | {reading.uuid: self._dated(reading, now) for reading in readings}

    def _dated(self, reading: GpuReading, now: float) -> GpuReading:
        if reading.error is None:
            return replace(reading, read_at=now)
        return replace(self._last.get(reading.uuid, reading), error=reading.error)


def _tell(before: GpuReading | None, reading: GpuReading) -> None:
    """A line where something has changed."""
    if reading.error == (before.error if before else None):
        return
    if reading.error is None:
        log.info("GPU %d is read again", reading.index)
    else:
        log.warning("GPU %d: its figures are old, and limits stay as they are: %s", reading.index, reading.error)


class _Worker(Generic[T]):
    """A daemon thread that does one thing each time it is asked. The threads of asyncio.to_thread are joined at exit, and a driver that
    hangs would hold that up for ever; a new thread for each look costs more than the look. It ends with this object."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._asked: SimpleQueue[asyncio.Future[T] | None] = SimpleQueue()
        threading.Thread(target=_serve, args=(work, self._asked), name="gpus", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def ask(self) -> "asyncio.Future[T]":
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._asked.put(answer)
        return answer


def _serve(work: Callable[[], T], asked: "SimpleQueue[asyncio.Future[T] | None]") -> None:
    while (answer := asked.get()) is not None:
        tell: Callable[[], None]
        try:
            tell = partial(answer.set_result, work())
        except Exception as error:
            tell = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # its loop is closed: nobody waits any more
            answer.get_loop().call_soon_threadsafe(tell)
