"""What Prometheus is shown, at /metrics: what is, read from the loop's last look as the other projections are, and what has happened, as
control/counts.py has counted it. Nothing here waits for an engine: their own metrics are at /metrics/engines (engine_metrics.py).

Labels are registered models, GPUs, our own words and statuses, so there are no more series than those. prometheus_client only writes the
text: its own counters cost a request too much.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, SummaryMetricFamily

from orchestrator import __version__
from orchestrator.api import asking, projections
from orchestrator.api.engine_metrics import EngineMetrics
from orchestrator.api.metric_list import METRICS
from orchestrator.api.peers import bears
from orchestrator.control.counts import Counts, ModelCounts, Spread, Took
from orchestrator.control.keys import is_here
from orchestrator.control.reconciler import Reconciler, View
from orchestrator.control.registry import Registry
from orchestrator.errors import Forbidden
from orchestrator.policy.instance import State

PIECE = 100  # rows that are written in one go: a millisecond. Of 200 models all is a tenth of a second
TEXT = "text/plain; version=0.0.4; charset=utf-8"
MADE: dict[str, type] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
    "summary": SummaryMetricFamily,
}


class Metrics:
    """`launch_servers`: by engine venv. `sleepers_limit`: bytes of host memory."""

    def __init__(
        self,
        registry: Registry,
        reconciler: Reconciler,
        counts: Counts,
        engines: EngineMetrics,
        gpu_source: str,
        state_problem: Callable[[], str | None] = lambda: None,
        launch_servers: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
        sleepers_limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._registry, self._loop, self._counts, self._engines = registry, reconciler, counts, engines
        self._gpu_source, self._state_problem = gpu_source, state_problem
        self._launch_servers, self._sleepers_limit = launch_servers, sleepers_limit
        self._process = ProcessCollector(registry=CollectorRegistry())  # CPU, memory and files of this process

    def router(self) -> APIRouter:
        """For operators."""
        router = APIRouter()
        router.add_api_route("/metrics", self.show, methods=["GET"], include_in_schema=False)
        router.add_api_route("/metrics/engines", self.show_engines, methods=["GET"], include_in_schema=False)
        return router

    def local(self, key: str | None) -> APIRouter:
        """For whoever is on this machine, and for those who have the admin's key."""
        router = APIRouter()
        router.include_router(self.router(), dependencies=[Depends(_from_here(key))])
        return router

    async def show(self) -> Response:
        servers = await self._launch_servers() if self._launch_servers else {}
        parts, last = [], ""
        for family in self._families(servers):
            text = generate_latest(_One(family))
            parts.append(text if family.name != last else text.split(b"\n", 2)[2])  # HELP and TYPE come once
            last = family.name
            await asyncio.sleep(0)  # requests pass in between
        return Response(b"".join(parts), media_type=TEXT)

    async def show_engines(self) -> Response:
        return Response(await self._engines.merged(), media_type=TEXT)

    def _families(self, servers: Mapping[str, Any]) -> Iterator[Metric]:
        view, known = self._loop.view, self._registry.known()
        yield from self._process.collect()
        yield from _gauge("orchestrator_build_info", [((__version__, self._gpu_source), 1)])
        yield from _gauge("orchestrator_state_problem", [((), self._state_problem() is not None)])
        yield from _loop(view, self._counts)
        yield from _servers(servers)
        host = projections.host(known, view, self._sleepers_limit())
        yield from _gauge("orchestrator_host_sleepers_bytes", [((), host["sleepers_bytes"])])
        if host["budget_bytes"] is not None:
            yield from _gauge("orchestrator_host_sleepers_limit_bytes", [((), host["budget_bytes"])])
        if view is not None:
            yield from _gpus(view)
            yield from _pools(view)
        yield from _models(known, view)
        yield from _happened(self._counts, set(projections.names(known, view)))


# ---- what is ----------------------------------------------------------------------------------------------------------


def _loop(view: View | None, counts: Counts) -> Iterator[Metric]:
    yield from _histogram("orchestrator_loop_seconds", [((), counts.looks)])
    yield from _counter("orchestrator_loop_errors_total", [((), counts.loop_errors)])
    if view is not None:
        yield from _gauge("orchestrator_loop_age_seconds", [((), max(0.0, time.monotonic() - view.snapshot.now))])


def _servers(servers: Mapping[str, Any]) -> Iterator[Metric]:
    yield from _gauge("orchestrator_launch_server_up", [((name,), one["state"] == "ready") for name, one in servers.items()])
    resident = [((name,), one["rss_bytes"]) for name, one in servers.items() if one["rss_bytes"] is not None]
    yield from _gauge("orchestrator_launch_server_resident_bytes", resident)
    yield from _counter("orchestrator_launch_server_forks_total", [((name,), one["forks"]) for name, one in servers.items()])


def _gpus(view: View) -> Iterator[Metric]:
    cards = [(str(budget["index"]), budget) for budget in projections.budgets(view)]
    yield from _gauge("orchestrator_gpu_info", [((gpu, one["uuid"], one["name"]), 1) for gpu, one in cards])
    yield from _gauge("orchestrator_gpu_size_bytes", [((gpu,), one["total_bytes"]) for gpu, one in cards])
    divided = []
    for gpu, one in cards:
        divided += [((gpu, kind), one[f"{kind}_bytes"]) for kind in ("reserve", "foreign", "fixed", "claims")]
        divided += [((gpu, "kv"), one["kv_used_bytes"]), ((gpu, "room"), one["pool_bytes"] - one["kv_used_bytes"])]
    yield from _gauge("orchestrator_gpu_memory_bytes", divided)
    yield from _gauge("orchestrator_gpu_free_bytes", [((gpu,), one["free_bytes"]) for gpu, one in cards])
    yield from _gauge("orchestrator_gpu_pool_bytes", [((gpu,), one["pool_bytes"]) for gpu, one in cards])
    yield from _gauge("orchestrator_gpu_kv_limit_bytes", [((gpu,), one["kv_limit_bytes"]) for gpu, one in cards])
    yield from _gauge("orchestrator_gpu_reading_age_seconds", [((gpu,), one["age_s"]) for gpu, one in cards])
    yield from _gauge("orchestrator_gpu_reading_error", [((gpu,), one["error"] is not None) for gpu, one in cards])
    index = _indexes(view)
    claims = [((model, index[uuid]), size) for (model, uuid), size in sorted(view.plan.claims.items()) if uuid in index]
    yield from _gauge("orchestrator_claim_bytes", claims)


def _pools(view: View) -> Iterator[Metric]:
    """Of each engine, for each of its GPUs: bytes are per GPU."""
    index, rows = _indexes(view), []
    held: list[Row] = []
    for instance in view.plan.instances.values():
        launch = instance.launch if instance.state is not State.WAITING else None
        seen = view.snapshot.engines.get(launch.id) if launch else None
        if launch is None or seen is None:
            continue
        pool = view.plan.pools.get(launch.id)
        for uuid in launch.gpus:
            if uuid in index:
                labels = (instance.model, index[uuid])
                held.append((labels, view.snapshot.held_bytes(launch.id, uuid)))
                if pool is not None and seen.segment is not None:
                    rows.append((labels, pool, seen))
    yield from _gauge("orchestrator_engine_gpu_bytes", held)
    yield from _gauge("orchestrator_kv_limit_bytes", [(labels, pool.limit_bytes) for labels, pool, _ in rows])
    acked = [(labels, seen.acked_limit_bytes) for labels, _, seen in rows if seen.acked_limit_bytes is not None]
    yield from _gauge("orchestrator_kv_limit_effective_bytes", acked)
    yield from _gauge("orchestrator_kv_target_bytes", [(labels, pool.target_bytes) for labels, pool, _ in rows])
    yield from _gauge("orchestrator_kv_used_bytes", [(labels, seen.segment.used_bytes) for labels, _, seen in rows if seen.segment])
    yield from _gauge("orchestrator_kv_prealloc_bytes", [(labels, seen.segment.prealloc_bytes) for labels, _, seen in rows if seen.segment])
    yield from _gauge("orchestrator_kv_floor_bytes", [(labels, pool.floor_bytes) for labels, pool, _ in rows])
    yield from _gauge("orchestrator_kv_ceiling_bytes", [(labels, pool.ceiling_bytes) for labels, pool, _ in rows])
    yield from _gauge("orchestrator_kv_demand_bytes", [(labels, pool.demand_bytes) for labels, pool, _ in rows])
    yield from _gauge("orchestrator_kv_floor_short", [(labels, pool.short) for labels, pool, _ in rows])


def _models(known: projections.Models, view: View | None) -> Iterator[Metric]:
    names, now = projections.names(known, view), time.monotonic()
    states = dict.fromkeys((state.value for state in State), 0) | projections.counts(known, view)
    yield from _gauge("orchestrator_models", [((state,), count) for state, count in states.items()])
    yield from _gauge("orchestrator_model_state", [((name, projections.instance(name, view).state.value), 1) for name in names])
    expected: list[Row] = []
    for name, model in sorted(known.items()):
        footprint = model.footprint
        moves = (("start", footprint.start_s), ("sleep", footprint.sleep_again_s), ("wake", footprint.wake_s))
        expected += [((name, move), seconds) for move, seconds in moves if seconds is not None]
    yield from _gauge("orchestrator_model_expected_seconds", expected)
    requests = [(name, projections.traffic(name, view)) for name in names]
    yield from _gauge("orchestrator_requests_running", [((name,), seen.in_flight) for name, seen in requests])
    yield from _gauge("orchestrator_requests_waiting", [((name,), seen.waiting) for name, seen in requests])
    since = [((name,), 0.0 if seen.waiting_since is None else max(0.0, now - seen.waiting_since)) for name, seen in requests]
    yield from _gauge("orchestrator_longest_wait_seconds", since)


# ---- what has happened ------------------------------------------------------------------------------------------------


def _happened(counts: Counts, names: set[str]) -> Iterator[Metric]:
    """Of what is registered; "" is whoever asked for nothing that is."""
    found = sorted((name, one) for name, one in counts.models.items() if name in names or not name)
    models = [(name, one) for name, one in found if name]

    def each(of: Callable[[ModelCounts], Mapping[Any, int]]) -> list["Row"]:
        return [((name, str(label)), count) for name, one in found for label, count in sorted(of(one).items())]

    yield from _counter("orchestrator_model_transitions_total", each(lambda one: one.states))
    yield from _counter("orchestrator_engine_failures_total", [((name,), one.failures) for name, one in models])
    yield from _summary("orchestrator_model_start_seconds", [((name,), one.starts) for name, one in models])
    yield from _summary("orchestrator_model_sleep_seconds", [((name,), one.sleeps) for name, one in models])
    yield from _summary("orchestrator_model_wake_seconds", [((name,), one.wakes) for name, one in models])
    yield from _counter("orchestrator_limit_moves_total", each(lambda one: one.limit_moves))
    yield from _counter("orchestrator_requests_total", each(lambda one: one.statuses))
    yield from _counter("orchestrator_errors_total", each(lambda one: one.errors))
    yield from _histogram("orchestrator_request_seconds", [((name,), one.answers) for name, one in models])
    yield from _histogram("orchestrator_time_to_first_token_seconds", [((name,), one.firsts) for name, one in models])
    yield from _histogram("orchestrator_queue_wait_seconds", [((name,), one.waits) for name, one in models])
    tokens = each(lambda one: {"prompt": one.prompt_tokens, "completion": one.completion_tokens})
    yield from _counter("orchestrator_tokens_total", [row for row in tokens if row[1]])


# ---- the text ---------------------------------------------------------------------------------------------------------

Row = tuple[tuple[str, ...], float]


class _One:
    """A family, as prometheus_client takes a registry."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _made(name: str, rows: Iterable[tuple[Any, ...]], piece: int = PIECE) -> Iterator[Metric]:
    """A family in pieces, so that none takes long; at least one. A row: labels, and what its kind takes."""
    told = METRICS[name]
    left = iter(rows)
    while True:
        family, some = MADE[told.kind](name, told.help, labels=told.labels), list(islice(left, piece))
        for row in some:
            family.add_metric(*row)
        yield family
        if len(some) < piece:
            return


def _gauge(name: str, rows: Iterable[Row]) -> Iterator[Metric]:
    return _made(name, rows)


def _counter(name: str, rows: Iterable[Row]) -> Iterator[Metric]:
    return _made(name, rows)


def _summary(name: str, rows: Iterable[tuple[tuple[str, ...], Took]]) -> Iterator[Metric]:
    return _made(name, ((labels, took.count, took.seconds) for labels, took in rows))


def _histogram(name: str, rows: Iterable[tuple[tuple[str, ...], Spread]]) -> Iterator[Metric]:
    """Of a model only where there is something: seventeen lines of zeros say nothing."""
    told = ((labels, spread) for labels, spread in rows if not labels or any(spread.counts))
    return _made(name, ((labels, _buckets(spread), spread.sum) for labels, spread in told), piece=PIECE // 10)


def _buckets(spread: Spread) -> list[tuple[str, int]]:
    bounds = (*map(str, spread.bounds), "+Inf")
    return list(zip(bounds, accumulate(spread.counts), strict=True))


def _indexes(view: View) -> dict[str, str]:
    return {gpu.uuid: str(gpu.index) for gpu in projections.gpus(view)}


def _from_here(key: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if key is not None and bears(request, key):
            return
        if not is_here(asking.address_of(request.scope, dict(request.scope["headers"]))):
            raise Forbidden("The metrics are for this machine alone (metrics.local); elsewhere they need admin.tcp and its key.")

    return check
