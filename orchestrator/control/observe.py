"""The only place that reads the world: ports -> one frozen Snapshot.

NVML is read in a thread and between two looks at the segments; of the two, the smaller use counts, so that pool memory is
never taken for larger than it is. A driver that fails or hangs leaves the last reading, marked with why it is old.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from orchestrator.control.ports import Engines, Gpus
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Snapshot, TrafficSeen

GPU_TIMEOUT_S = 2.0  # a read takes 0.2 ms on a healthy card
T = TypeVar("T")


class Observer:
    def __init__(self, gpus: Gpus, engines: Engines, traffic: Callable[[], Mapping[str, TrafficSeen]], clock: Callable[[], float]) -> None:
        self._gpus, self._engines, self._traffic, self._clock = gpus, engines, traffic, clock
        self._last: dict[str, GpuReading] = {}
        self._reading: asyncio.Future[Sequence[GpuReading]] | None = None  # at most one read is under way, however long it hangs

    async def look(self) -> Snapshot:
        before = self._engines.look()
        await self._read_gpus()
        engines = {key: _smaller(seen, before.get(key)) for key, seen in self._engines.look().items()}
        return Snapshot(now=self._clock(), gpus=dict(self._last), engines=engines, traffic=self._traffic())

    async def _read_gpus(self) -> None:
        if self._reading is None:
            self._reading = _in_thread(self._gpus.read)
        await asyncio.wait([self._reading], timeout=GPU_TIMEOUT_S)
        if not self._reading.done():
            self._stale(f"the driver has not answered for {GPU_TIMEOUT_S:.0f}s")
            return
        read, self._reading = self._reading, None  # whatever it brought, the next look reads afresh
        try:
            readings = read.result()
        except OSError as error:
            self._stale(str(error))
        else:
            fresh = {reading.uuid: replace(reading, read_at=self._clock()) for reading in readings}
            for uuid, old in self._last.items():
                if uuid not in fresh:
                    fresh[uuid] = replace(old, error="the driver does not list it any more")
            self._last = fresh

    def _stale(self, why: str) -> None:
        self._last = {uuid: replace(reading, error=why) for uuid, reading in self._last.items()}


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """In a daemon thread: those of asyncio.to_thread are joined at exit, and a driver that hangs would hold that up for ever."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="gpus", daemon=True).start()
    return asyncio.wrap_future(answer)


def _smaller(seen: EngineSeen, before: EngineSeen | None) -> EngineSeen:
    if before is None or before.segment is None or seen.segment is None or before.segment.mapped_bytes >= seen.segment.mapped_bytes:
        return seen
    used, prealloc = before.segment.used_bytes, before.segment.prealloc_bytes
    return replace(seen, segment=replace(seen.segment, used_bytes=used, prealloc_bytes=prealloc))
