"""The daemon's two servers on real sockets, with the real registry, store, loop and traffic, and engines that a test moves by hand.

An engine here is only a word ("ready", "died"); what answers for it is the scripted upstream, whatever the launch.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.admin import About, Admin
from orchestrator.api.app import UsersApp, operators, operators_app
from orchestrator.api.bodies import Bodies
from orchestrator.api.desired import DesiredApi
from orchestrator.api.engine_metrics import EngineMetrics
from orchestrator.api.events import EventsApi
from orchestrator.api.fate import Fates
from orchestrator.api.keys import KeysApi
from orchestrator.api.merged_logs import LogsApi
from orchestrator.api.metrics import Metrics
from orchestrator.api.openai import forwarded, models_router
from orchestrator.api.peers import Peers
from orchestrator.api.proxy import Proxy
from orchestrator.api.realtime import Realtime
from orchestrator.api.server import Server
from orchestrator.api.through import Through
from orchestrator.api.upstream import Upstreams
from orchestrator.control.counts import Counts
from orchestrator.control.keys import Keys
from orchestrator.control.ledger import Ledger
from orchestrator.control.observe import Observer
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry
from orchestrator.control.traffic import Traffic
from orchestrator.drivers import vllm
from orchestrator.drivers.sources import Sources
from orchestrator.drivers.store import SqliteStore
from orchestrator.policy.instance import Launch
from orchestrator.policy.lifecycle import Rules
from orchestrator.policy.model import ModelSpec, slug
from orchestrator.policy.snapshot import EngineSeen, GpuReading, Segment, TrafficSeen
from orchestrator.policy.units import GIB, MIB
from tests.api.rawclient import Answer, Client, connected
from tests.api.upstream import Upstream, scripted

if TYPE_CHECKING:
    from orchestrator.api.traces import Traces

DEADLINE_S = 20.0


class Cards:
    def read(self) -> Sequence[GpuReading]:
        return [GpuReading("GPU-0", 0, "Card", 80 * GIB, 79 * GIB)]


class Engines:
    """Engines that do what they are told by the loop, and what the test says beside."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.seen: dict[str, EngineSeen] = {}
        self.launches: dict[str, Launch] = {}
        self.slow: set[str] = set()  # models whose engine starts or wakes only when the test says so
        self.notify: Callable[[], None] = lambda: None

    async def adopt(self) -> Sequence[Launch]:
        return []

    def start(self, launch: Launch) -> None:
        self.launches[launch.id] = launch
        pids = frozenset({4242})
        self.seen[launch.id] = EngineSeen(launch.id, alive=True, pid=4242, pids=pids, phase="loading weights", started_at=time.monotonic())
        if launch.spec.name not in self.slow:
            self.ready(launch.spec.name)

    def ready(self, model: str) -> None:
        launch = self._of(model)
        self.seen[launch.id] = replace(
            self.seen[launch.id],
            ready=True,
            phase="ready",
            segment=Segment(launch.ceiling_bytes, 96 * MIB, 0),
            bundle_bytes=96 * MIB,
            capacity_bytes=launch.ceiling_bytes,
        )
        self.notify()

    def die(self, model: str, error: str, *log: str) -> None:
        launch = self._of(model)
        self.seen[launch.id] = replace(self.seen[launch.id], alive=False, ready=False, error=error, log_tail=log)
        self.notify()

    def stop(self, launch_id: str) -> None:
        self.seen[launch_id] = replace(self.seen[launch_id], alive=False, ready=False, gone=True, segment=None)
        self.notify()

    def set_limit(self, launch_id: str, limit_bytes: int) -> None:
        segment = self.seen[launch_id].segment
        assert segment is not None
        segment = replace(segment, limit_bytes=limit_bytes)
        self.seen[launch_id] = replace(self.seen[launch_id], segment=segment, acked_limit_bytes=limit_bytes)

    def sleep(self, launch_id: str, level: int) -> None:
        self.seen[launch_id] = replace(self.seen[launch_id], asleep=True, host_bytes=15 * GIB, sleep_s=0.5)
        self.notify()

    def wake(self, launch_id: str) -> None:
        if self.launches[launch_id].spec.name in self.slow:
            return
        self.seen[launch_id] = replace(self.seen[launch_id], asleep=False, wake_s=0.25)
        self.notify()

    def trim(self, launch_id: str) -> None:
        pass

    def repair(self, launch_id: str) -> None:
        pass

    def look(self) -> Mapping[str, EngineSeen]:
        return dict(self.seen)

    def segments(self) -> Mapping[str, Segment | None]:
        return {launch_id: seen.segment for launch_id, seen in self.seen.items()}

    def forget(self, launch_id: str) -> None:
        self.seen.pop(launch_id, None)

    def log_file(self, model: str) -> Path | None:
        return next(iter(self.log_files(model)), None)

    def log_files(self, model: str) -> list[Path]:
        return sorted(self.logs.glob(f"{slug(model)}.*.log"), reverse=True)

    def _of(self, model: str) -> Launch:
        return next(launch for launch in reversed(self.launches.values()) if launch.spec.name == model)


@dataclass
class House:
    users: tuple[str, int]
    operators: Path
    engines: Engines
    registry: Registry
    loop: Reconciler
    traffic: Traffic
    upstream: Upstream
    counts: Counts

    async def until(self, happened: Callable[[], object], what: str) -> None:
        """Looked at after each round of the loop (every 50 ms, and when something happens)."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not happened():
                    async with self.loop.ticked:
                        await self.loop.ticked.wait()
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}; {self.traffic.seen()}") from None

    def state(self, model: str) -> str:
        instances = self.loop.view.plan.instances if self.loop.view else {}
        return instances[model].state.value if model in instances else "none"

    async def until_state(self, model: str, state: str) -> None:
        await self.until(lambda: self.state(model) == state, f"{model} is {state}")

    def seen(self, model: str) -> TrafficSeen:
        return self.traffic.seen()[model]

    async def until_counts(self, model: str, in_flight: int, waiting: int) -> None:
        def counts() -> bool:
            seen = self.seen(model)
            return (seen.in_flight, seen.waiting) == (in_flight, waiting)

        await self.until(counts, f"{model}: {in_flight} in flight, {waiting} waiting")

    def client(self) -> "contextlib.AbstractAsyncContextManager[Client]":
        return connected(self.users)

    async def post(self, target: str, body: bytes, *headers: str, method: str = "POST") -> Answer:
        """One call that is answered without an engine's help."""
        async with self.client() as client:
            await client.request(target, body, *headers, method=method)
            return await client.answer()

    async def get(self, target: str, *headers: str) -> Answer:
        return await self.post(target, b"", *headers, method="GET")

    async def operate(self, method: str, target: str, body: bytes = b"") -> Answer:
        """One call of the admin API, on its socket."""
        async with connected(self.operators) as client:
            await client.request(f"/api/v1{target}", body, method=method)
            return await client.answer()


async def nothing() -> None:
    """What is done when a key was made, in a house that listens where it listens."""


@contextlib.asynccontextmanager
async def house(
    folder: Path,
    *specs: Mapping[str, Any],
    max_wait_s: float = 60.0,
    max_body_bytes: int = 1 << 20,
    max_bodies_bytes: int = 1 << 30,
    key: str | None = None,
    ready: bool = True,
    keys: Keys | None = None,
    local_metrics: bool = False,
    traces: "Traces | None" = None,
) -> AsyncIterator[House]:
    """`specs`: models of the config file. Unless `ready` is False they are up when the house is entered."""
    wake = asyncio.Event()
    rules = Rules()
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted(folder / "engine.sock"))
        store = SqliteStore(folder / "state.db")
        await store.open()
        stack.push_async_callback(store.close)
        engines = Engines(folder)
        engines.notify = wake.set
        models = [ModelSpec.model_validate({"preload": ready, **spec}) for spec in specs]
        registry = Registry(store, Sources({}), models, ["default"], rules)
        await registry.load()
        counts = Counts(traces.move if traces else None)
        traffic = Traffic(wake.set, max_wait_s, counts=counts)
        upstreams = Upstreams(lambda launch_id: str(upstream.path))
        keys = keys or Keys()
        ledger = Ledger(keys, store)
        await ledger.load()
        fates = Fates(counts, [traces.request] if traces else (), spans=1.0 if traces else None)
        proxy = Proxy(traffic, registry.resolve, upstreams, keys, Bodies(max_body_bytes, max_bodies_bytes), fates)
        realtime = Realtime(traffic, registry.resolve, lambda launch_id: str(upstream.path), keys, fates)
        observer = Observer(Cards(), engines, traffic.seen, time.monotonic)
        loop = Reconciler(registry, traffic, engines, observer, store, rules, 0.05, wake, counts=counts)
        about = About(
            listen=lambda: "http://127.0.0.1:1",
            admin_socket=str(folder / "admin.sock"),
            gpu_source="nvml",
            config=("a.yaml",),
            state_dir=str(folder),
            phases=vllm.PHASES,
            started_at=time.monotonic(),
            host_budget_bytes=64 * GIB,
        )
        socket_of = lambda launch_id: str(upstream.path)  # noqa: E731
        admin = Admin(registry, loop, about, socket_of, engines.log_file, store.events, lambda pid: f"eve: train.py (pid {pid})").router()
        metrics = Metrics(registry, loop, counts, EngineMetrics(upstreams, lambda: loop.view), "nvml", sleepers_limit=lambda: 64 * GIB)
        keys_api, through = KeysApi(ledger, registry.resolve, nothing), Through(proxy, registry.resolve, loop)
        merged = LogsApi(registry.known, registry.resolve, engines.log_files)
        more = (DesiredApi(registry, loop), EventsApi(store), merged, keys_api, metrics, through)
        admin = operators(admin, *(each.router() for each in more))
        public = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        private = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        private.bind(str(folder / "admin.sock"))
        private.listen()
        servers = [
            (
                Server(
                    UsersApp(
                        [models_router(registry, loop, lambda: 1.5e9, keys), *([metrics.local(key)] if local_metrics else [])],
                        forwarded(proxy, realtime),
                        admin,
                        key,
                    ),
                    direct=proxy.direct,
                ),
                public,
            ),
            (Server(operators_app(admin, Peers(None))), private),
        ]
        for _ in range(4):  # wanted, waiting, starting, ready
            await loop.tick()
        looping = asyncio.create_task(loop.run())
        serving = [asyncio.create_task(server.serve([sock])) for server, sock in servers]

        async def stop() -> None:
            for server, _ in servers:
                server.stop(at_once=True)
            await asyncio.wait_for(asyncio.gather(*serving), DEADLINE_S)
            looping.cancel()
            await asyncio.wait([looping])
            upstreams.tidy(())
            await loop.settle()

        stack.push_async_callback(stop)
        found = House(public.getsockname(), folder / "admin.sock", engines, registry, loop, traffic, upstream, counts)
        if ready:
            for spec in specs:
                assert found.state(spec["name"]) == "ready" or not spec.get("preload", True)
        yield found
