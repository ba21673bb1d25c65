"""One look at the world, frozen: what control/observe.py saw and policy decides from.

Nothing here is remembered; what must be remembered between looks is an Instance or a PoolMemory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as NVML shows it. `processes` maps pid to bytes; empty where the driver hides them. `error` says why it is old."""

    uuid: str
    index: int
    name: str
    total_bytes: int
    free_bytes: int
    processes: Mapping[int, int] = field(default_factory=dict)
    read_at: float = field(default=0.0, compare=False)
    error: str | None = None

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - self.free_bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """kvcached's 24 bytes: bytes per GPU. `limit` is the last one written, not the one applied."""

    limit_bytes: int
    used_bytes: int
    prealloc_bytes: int

    @property
    def mapped_bytes(self) -> int:
        return self.used_bytes + self.prealloc_bytes


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """One engine, by its launch id.

    alive: the process we started runs. gone: no process of its session is left and what it left behind is removed.
    ready: it answered a token and its KV pool is under our control. error: why it will never be ready, or no longer is.
    asleep: it said so itself, and until it has woken and answered a token again. host_bytes: pinned host memory, measured when it
    fell asleep; it keeps that until it ends. sleep_s, wake_s: how long it took the last time.
    segment_lost: somebody removed or spoiled its segment, and `segment` is the last one that was seen.
    hindered: its `error` is that the daemon could not start it (the disk is full), which says nothing of the engine.
    undying: processes of it that SIGKILL does not end, for people.
    """

    launch_id: str
    alive: bool
    gone: bool = False
    ready: bool = False
    phase: str = "spawning"
    error: str | None = None
    log_tail: tuple[str, ...] = ()
    adopted: bool = False  # found running: how long its start took, and what it held then, was not seen
    pid: int | None = None
    pids: frozenset[int] = frozenset()
    started_at: float = 0.0
    segment: Segment | None = None
    capacity_bytes: int = 0
    bundle_bytes: int = 0
    acked_limit_bytes: int | None = None
    asleep: bool = False
    host_bytes: int = 0
    sleep_s: float | None = None
    wake_s: float | None = None
    segment_lost: bool = False
    hindered: bool = False
    undying: str = ""


@dataclass(frozen=True, slots=True)
class TrafficSeen:
    """What users do with one model. `last_used` is the loop's clock; None: not since the daemon started.

    Tokens are bounds for prompt and answer together: of the largest request that runs or waits, and of all that wait.
    `waiting_since`: the loop's clock when the one came that waits longest. `priority`: the highest that waits, with what its waiting
    adds; 0 where nobody waits. `arrivals`: requests a second, averaged over the last minutes.
    """

    in_flight: int = 0
    waiting: int = 0
    last_used: float | None = None
    largest_tokens: int = 0
    waiting_tokens: int = 0
    waiting_since: float | None = None
    priority: int = 0
    arrivals: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    gpus: Mapping[str, GpuReading]
    engines: Mapping[str, EngineSeen]
    traffic: Mapping[str, TrafficSeen]

    def held_bytes(self, launch_id: str, gpu: str) -> int:
        """What NVML shows for the processes of one launch on one GPU."""
        seen, reading = self.engines.get(launch_id), self.gpus.get(gpu)
        if seen is None or reading is None:
            return 0
        return sum(reading.processes.get(pid, 0) for pid in seen.pids)
