"""The fake outside: GPUs whose free memory is what the engines leave, engines that go through their phases step by step, a store in
memory, sources, a clock moved by hand. They agree with each other; tests/contract holds them to what the real ones do.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.errors import StoreError
from orchestrator.policy.footprint import Shape
from orchestrator.policy.instance import Launch
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment
from orchestrator.policy.stored import Event, Stored
from orchestrator.policy.units import GIB, MIB

BUNDLE = 96 * MIB  # Qwen2.5-0.5B
SHAPE = Shape(weights_bytes=1 * GIB, layers=24, kv_heads=2, head_dim=64, max_position=32768)
CONTEXT = 512 * MIB
PROFILE = 2 * GIB
BASE = 615 * MIB
CARD = 80 * GIB


def spec(name: str = "a", **fields: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "source": "/models/small", **fields})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    """One engine. Tests turn its knobs: `stuck` stops its phases, `fails` is what it dies of at its next step."""

    launch: Launch
    pid: int
    started_at: float
    phase: str = "spawning"
    alive: bool = True
    gone: bool = False
    ready: bool = False
    adopted: bool = False
    stopping: bool = False
    stuck: bool = False
    immortal: bool = False
    fails: str | None = None
    error: str | None = None
    hindered: bool = False
    log: tuple[str, ...] = ()
    fixed_bytes: int = 0
    segment: Segment | None = None
    hidden: bool = False  # somebody removed the segment, or made it something else: the engine goes on
    acked: int | None = None
    asleep: bool = False
    host_bytes: int = 0
    doing: str = ""  # "sleep" or "wake", until its next step

    @property
    def held_bytes(self) -> int:
        """On each of its GPUs. KV besides what the segment shows: the page that all unmapped ones show."""
        kv = self.segment.mapped_bytes + BUNDLE if self.segment else 0
        return self.fixed_bytes + kv

    def use(self, used_bytes: int) -> None:
        """Requests took KV pages, as far as the limit lets them, or gave them back."""
        assert self.segment is not None
        allowed = used_bytes if used_bytes <= self.segment.used_bytes else min(used_bytes, self.segment.limit_bytes)
        self.segment = replace(self.segment, used_bytes=max(BUNDLE, allowed // BUNDLE * BUNDLE))


class FakeGpus:
    """`foreign` is memory of others, `missing` cards are not listed, `error` fails a read, a `gate` holds it up until it is set."""

    def __init__(self, count: int = 1, total_bytes: int = CARD) -> None:
        self.total_bytes = {f"GPU-{n}": total_bytes for n in range(count)}
        self.engines: dict[str, FakeEngine] = {}
        self.foreign = dict.fromkeys(self.total_bytes, 0)
        self.lingering: dict[int, tuple[str, int]] = {}  # dead processes that the driver shows for a while: pid -> gpu, bytes
        self.missing: set[str] = set()
        self.error: Exception | None = None
        self.gate: threading.Event | None = None
        self.reads = 0

    def read(self) -> Sequence[GpuReading]:
        self.reads += 1
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        readings = []
        for index, (uuid, total) in enumerate(self.total_bytes.items()):
            if uuid in self.missing:
                continue
            held = {e.pid: e.held_bytes for e in self.engines.values() if uuid in e.launch.gpus and not e.gone}
            held |= {pid: size for pid, (gpu, size) in self.lingering.items() if gpu == uuid}
            free = total - BASE - self.foreign[uuid] - sum(held.values())
            readings.append(GpuReading(uuid, index, "Fake GPU", total, max(0, free), held))
        return readings


class FakeEngines:
    """control's Engines. start and stop only note what is wanted; `step` is the world going on by one phase."""

    def __init__(self, gpus: FakeGpus, clock: Clock, journal: list[str] | None = None) -> None:
        self._gpus, self._clock, self._pids = gpus, clock, iter(range(100, 100_000))
        self.journal = journal if journal is not None else []
        self.all = gpus.engines
        self.records: list[FakeEngine] = []  # what a former daemon left
        self.forgotten: list[str] = []
        self.disk_full = False  # each start is hindered
        self.fail_next: list[tuple[str, tuple[str, ...]]] = []  # each start takes one: the error it dies of, and its log
        self.vanishing: set[str] = set()  # launches whose segment is gone when a limit is written

    def __getitem__(self, model: str) -> FakeEngine:
        """The newest engine of a model."""
        return [engine for engine in self.all.values() if engine.launch.spec.name == model][-1]

    async def adopt(self) -> Sequence[Launch]:
        for engine in self.records:
            engine.adopted, engine.ready, engine.started_at = True, False, self._clock()
            self.all[engine.launch.id] = engine
        return [engine.launch for engine in self.records if engine.alive]

    def start(self, launch: Launch) -> None:
        engine = FakeEngine(launch, next(self._pids), self._clock())
        if self.fail_next:
            engine.fails, engine.log = self.fail_next.pop(0)
        if self.disk_full:
            engine.stuck, engine.hindered, engine.error = True, True, "state.db: database or disk is full"
        self.journal.append(f"start {launch.spec.name}")
        self.all[launch.id] = engine

    def stop(self, launch_id: str) -> None:
        if launch_id in self.all:
            self.journal.append(f"stop {self.all[launch_id].launch.spec.name}")
            self.all[launch_id].stopping = True

    def set_limit(self, launch_id: str, limit_bytes: int) -> None:
        engine = self.all.get(launch_id)
        if engine is None or engine.segment is None or engine.hidden or launch_id in self.vanishing:
            raise FileNotFoundError(2, "No such file or directory", f"/dev/shm/{launch_id}")
        self.journal.append(f"limit {engine.launch.spec.name}")
        engine.segment = replace(engine.segment, limit_bytes=limit_bytes)

    def sleep(self, launch_id: str, level: int) -> None:
        engine = self.all.get(launch_id)
        if engine is not None and engine.ready and engine.alive:
            self.journal.append(f"sleep {engine.launch.spec.name}")
            engine.doing = "sleep"

    def wake(self, launch_id: str) -> None:
        engine = self.all.get(launch_id)
        if engine is not None and engine.asleep and engine.alive:
            self.journal.append(f"wake {engine.launch.spec.name}")
            engine.doing = "wake"

    def trim(self, launch_id: str) -> None:
        """What it keeps mapped for nobody goes: the reserve, and what requests that are over left in the prefix cache."""
        engine = self.all.get(launch_id)
        if engine is not None and engine.ready and engine.segment is not None:
            self.journal.append(f"trim {engine.launch.spec.name}")
            engine.segment = replace(engine.segment, used_bytes=BUNDLE, prealloc_bytes=0)

    def repair(self, launch_id: str) -> None:
        engine = self.all.get(launch_id)
        if engine is not None and engine.ready and engine.alive:
            self.journal.append(f"repair {engine.launch.spec.name}")
            engine.hidden = False

    def look(self) -> Mapping[str, EngineSeen]:
        return {launch_id: self._seen(engine) for launch_id, engine in self.all.items()}

    def segments(self) -> Mapping[str, Segment | None]:
        return {launch_id: None if engine.hidden else engine.segment for launch_id, engine in self.all.items()}

    def forget(self, launch_id: str) -> None:
        self.forgotten.append(launch_id)
        self.all.pop(launch_id, None)

    def step(self) -> None:
        for engine in self.all.values():
            self._step(engine)

    def crash(self, model: str, reason: str = "its process was killed by SIGKILL", log: tuple[str, ...] = ()) -> None:
        """Its processes end by themselves; the segment stays, as after a SIGKILL."""
        engine = self[model]
        engine.alive, engine.error, engine.log, engine.fixed_bytes = False, reason, log or engine.log, 0
        if engine.segment is not None:
            engine.segment = replace(engine.segment, used_bytes=0, prealloc_bytes=0)

    def _step(self, engine: FakeEngine) -> None:
        if engine.stopping:
            if not engine.immortal:
                engine.alive, engine.ready, engine.gone, engine.segment, engine.fixed_bytes = False, False, True, None, 0
        elif engine.alive and engine.fails is not None:
            self.crash(engine.launch.spec.name, engine.fails)
        elif engine.alive and not engine.stuck:
            self._next_phase(engine)

    def _next_phase(self, engine: FakeEngine) -> None:
        match engine.phase:
            case "spawning":
                engine.phase, engine.fixed_bytes = "loading weights", CONTEXT + SHAPE.weights_bytes
            case "loading weights":
                engine.phase = "profiling memory"
                engine.fixed_bytes += PROFILE
            case "profiling memory":
                engine.phase = "making the KV cache"
                engine.segment = Segment(engine.launch.ceiling_bytes // BUNDLE * BUNDLE, BUNDLE, BUNDLE)
            case "making the KV cache":
                engine.phase = "probing"
            case "probing":
                engine.phase, engine.ready = "ready", True
                engine.fixed_bytes = CONTEXT + SHAPE.weights_bytes
            case "ready":
                engine.ready = True
                self._sleep_or_wake(engine)
                assert engine.segment is not None
                engine.acked = engine.segment.limit_bytes

    def _sleep_or_wake(self, engine: FakeEngine) -> None:
        doing, engine.doing = engine.doing, ""
        if doing and self.fail_next:
            engine.error, engine.log = self.fail_next.pop(0)
        elif doing == "sleep":
            engine.asleep, engine.fixed_bytes, engine.host_bytes = True, CONTEXT, SHAPE.weights_bytes
        elif doing == "wake":
            engine.asleep, engine.fixed_bytes = False, CONTEXT + SHAPE.weights_bytes

    def _seen(self, engine: FakeEngine) -> EngineSeen:
        shown = engine.ready and engine.segment is not None  # what a ready engine once said of itself is kept
        return EngineSeen(
            launch_id=engine.launch.id,
            alive=engine.alive,
            gone=engine.gone,
            ready=engine.ready,
            phase=engine.phase,
            error=engine.error,
            log_tail=engine.log,
            adopted=engine.adopted,
            pid=engine.pid,
            pids=frozenset({engine.pid}),
            started_at=engine.started_at,
            segment=None if engine.hidden else engine.segment,
            capacity_bytes=engine.launch.ceiling_bytes // BUNDLE * BUNDLE if shown else 0,
            bundle_bytes=BUNDLE if shown else 0,
            acked_limit_bytes=engine.acked,
            asleep=engine.asleep,
            host_bytes=engine.host_bytes,
            sleep_s=0.5,
            wake_s=0.25,
            hindered=engine.hindered,
        )


@dataclass
class FakeStore:
    """`broken` fails every write; `gate`, when set, holds each write up until it is opened."""

    models: dict[str, ModelSpec] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    overrides: dict[str, Mapping[str, object]] = field(default_factory=dict)
    footprints: dict[str, Mapping[str, float]] = field(default_factory=dict)
    kept: list[Event] = field(default_factory=list)
    broken: bool = False
    gate: asyncio.Event | None = None

    async def load(self) -> Stored:
        return Stored(tuple(self.models.values()), frozenset(self.held), dict(self.overrides), dict(self.footprints))

    async def put_model(self, spec: ModelSpec, added_at: float) -> None:
        await self._write()
        self.models[spec.name] = spec
        self.held.discard(spec.name)
        self.overrides.pop(spec.name, None)

    async def remove_model(self, name: str) -> None:
        await self._write()
        del self.models[name]
        self.held.discard(name)
        self.overrides.pop(name, None)

    async def change_models(self, put: Sequence[ModelSpec], removed: Sequence[str], at: float) -> None:
        await self._write()
        for name in (*removed, *(spec.name for spec in put)):
            if self.models.pop(name, None) is None or name in removed:
                self.held.discard(name)
            self.overrides.pop(name, None)
        self.models |= {spec.name: spec for spec in put}

    async def set_overrides(self, name: str, overrides: Mapping[str, object]) -> None:
        await self._write()
        self.overrides[name] = dict(overrides)

    async def set_held(self, name: str, held: bool) -> None:
        await self._write()
        (self.held.add if held else self.held.discard)(name)

    async def put_footprint(self, key: str, figures: Mapping[str, float]) -> None:
        await self._write()
        self.footprints[key] = dict(figures)

    async def add_events(self, events: Sequence[Event]) -> None:
        await self._write()
        self.kept.extend(events)

    async def events(self, model: str | None, limit: int, kind: str | None = None, since: float = 0.0, after: int = 0) -> Sequence[Event]:
        return [event for event in self.kept if model in (None, event.model) and kind in (None, event.kind)][-limit:]

    async def _write(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.broken:
            raise StoreError("state.db: disk I/O error; nothing was changed")


@dataclass
class FakeSources:
    """`bad` sources have a problem; the shape of every other one is `shapes`' or SHAPE."""

    bad: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape | None] = field(default_factory=dict)

    def problem(self, spec: ModelSpec) -> str | None:
        return self.bad.get(spec.source)

    def shape(self, spec: ModelSpec) -> Shape | None:
        return self.shapes.get(spec.source, SHAPE)
