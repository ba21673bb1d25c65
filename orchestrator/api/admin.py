"""The operators' routes, what orchestratorctl talks to: projections of the registry and of the loop's last look, and few commands.

A command changes the registry and wakes the loop; what becomes of it is watched, not awaited. Only `add` awaits one look of the
loop: a request right behind its answer must find the model's door.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from orchestrator import __version__
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import LIMIT_FIELDS, Registry
from orchestrator.errors import BadRequest, ModelNotFound, Problem, SpecError
from orchestrator.policy import explain
from orchestrator.policy.instance import Instance, State
from orchestrator.policy.lifecycle import Known
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.snapshot import EngineSeen, GpuReading, TrafficSeen
from orchestrator.policy.stored import Event

LOG_POLL_S = 0.2
LOG_BLOCK = 64 * 1024
MAX_TAIL = 100_000
LOOK_TIMEOUT_S = 5.0  # a look takes milliseconds, 2 s where the driver hangs


@dataclass(frozen=True)
class About:
    """What the daemon says of itself."""

    listen: Callable[[], str]
    admin_socket: str
    gpu_source: str
    config: tuple[str, ...]
    state_dir: str
    phases: tuple[str, ...]
    started_at: float  # time.monotonic()


class Admin:
    def __init__(
        self,
        registry: Registry,
        reconciler: Reconciler,
        about: About,
        socket_of: Callable[[str], str],
        log_file: Callable[[str], Path | None],
        events: Callable[[str | None, int], Any],
        who: Callable[[int], str],
    ) -> None:
        """`who`: pid -> its user and program, for people."""
        self._registry, self._loop, self._about = registry, reconciler, about
        self._socket_of, self._log_file, self._events, self._who = socket_of, log_file, events, who

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/status", self.status, methods=["GET"])
        router.add_api_route("/events", self.events, methods=["GET"])
        router.add_api_route("/explain", self.explain, methods=["GET"])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models", self.add, methods=["POST"], status_code=201)
        for verb in ("start", "stop"):
            router.add_api_route(f"/models/{{name:path}}/{verb}", getattr(self, verb), methods=["POST"], status_code=202)
        router.add_api_route("/models/{name:path}/limit", self.limit, methods=["POST"])
        router.add_api_route("/models/{name:path}/watch", self.watch, methods=["GET"])
        router.add_api_route("/models/{name:path}/logs", self.logs, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.describe, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.remove, methods=["DELETE"], status_code=202)
        return router

    # ---- questions ------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        view, about = self._loop.view, self._about
        counts: dict[str, int] = {}
        for name in self._names():
            state = self._instance(name).state.value
            counts[state] = counts.get(state, 0) + 1
        gpus = []
        for uuid, gpu in sorted(view.snapshot.gpus.items(), key=lambda item: item[1].index) if view else ():
            budget = view.plan.gpus[uuid] if view else None
            if budget is None:
                continue
            gpus.append(
                {
                    "index": gpu.index,
                    "uuid": uuid,
                    "name": gpu.name,
                    "total_bytes": budget.total_bytes,
                    "used_bytes": budget.used_bytes,
                    "free_bytes": gpu.free_bytes,
                    "reserve_bytes": budget.reserve_bytes,
                    "foreign_bytes": budget.foreign_bytes,
                    "fixed_bytes": budget.fixed_bytes,
                    "claims_bytes": budget.claims_bytes,
                    "kv_used_bytes": budget.kv_mapped_bytes,
                    "kv_limit_bytes": budget.kv_limit_bytes,
                    "pool_bytes": budget.pool_bytes,
                    "age_s": round(max(0.0, time.monotonic() - gpu.read_at), 3),
                    "error": gpu.error,
                }
            )
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - about.started_at, 1),
            "listen": about.listen(),
            "admin_socket": about.admin_socket,
            "gpu_source": about.gpu_source,
            "config": list(about.config),
            "state_dir": about.state_dir,
            "models": counts,
            "gpus": gpus,
            "loop": {
                "ticks": view.ticks if view else 0,
                "last_ms": round(1000 * view.took_s, 3) if view else None,
                "errors": view.errors if view else 0,
            },
        }

    async def explain(self) -> dict[str, Any]:
        """Every GPU's memory as lines that add up to the card, and its pools with what would change their limits."""
        view = self._loop.view
        if view is None:
            return {"gpus": []}
        gpus = []
        for uuid, gpu in sorted(view.snapshot.gpus.items(), key=lambda item: item[1].index):
            rows = [
                {"what": row.what, "bytes": row.bytes, "why": row.why, "model": row.model, "who": self._who(row.pid) if row.pid else None}
                for row in explain.lines(uuid, view.snapshot, view.plan)
            ]
            here = [i for i in view.plan.instances.values() if i.launch and uuid in i.launch.gpus and i.launch.id in view.plan.pools]
            gpus.append(
                {
                    "index": gpu.index,
                    "uuid": uuid,
                    "name": gpu.name,
                    "error": gpu.error,
                    "total_bytes": gpu.total_bytes,
                    "lines": rows,
                    "pool_bytes": view.plan.gpus[uuid].pool_bytes,
                    "pools": [self._explained(i.model, i.launch.id) for i in here if i.launch],
                }
            )
        return {"gpus": gpus}

    async def models(self) -> dict[str, Any]:
        return {"models": [self._model(name) for name in self._names()]}

    async def describe(self, name: str) -> dict[str, Any]:
        name = self._resolve(name)
        return {**self._model(name), "events": _events(await self._events(name, 50))}

    async def events(self, tail: int = Query(100, ge=1, le=10_000), model: str | None = None) -> dict[str, Any]:
        return {"events": [{**shown, "model": e.model} for e, shown in ((e, _event(e)) for e in await self._events(model, tail))]}

    async def watch(self, name: str, request: Request) -> StreamingResponse:
        """The model now and at each change, a JSON object a line, until it is gone."""
        name = self._resolve(name)

        async def lines() -> AsyncIterator[bytes]:
            last: Any = None
            while True:
                try:
                    model = self._model(self._resolve(name))
                except ModelNotFound:
                    yield msgspec.json.encode({"name": name, "state": "removed"}) + b"\n"
                    return
                telling = _without_clocks(model)
                if telling != last:
                    last = telling
                    yield msgspec.json.encode(model) + b"\n"
                async with self._loop.ticked:
                    await self._loop.ticked.wait()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def logs(self, name: str, tail: int = Query(100, ge=0, le=MAX_TAIL), follow: bool = False) -> StreamingResponse:
        name = self._resolve(name)
        path = self._log_file(name)
        if path is None and not follow:
            raise ModelNotFound(f"The model {name!r} has no log: it was never started.", code="no_log")

        async def text() -> AsyncIterator[bytes]:
            current, at = path, 0
            if current is not None:
                lines, at = await asyncio.to_thread(_tail, current, tail)
                yield lines
            while follow:
                newest = self._log_file(name)  # a new launch writes a new file
                if newest is not None and newest != current:
                    current, at = newest, 0
                if current is not None and (block := await asyncio.to_thread(_read_from, current, at)):
                    at += len(block)
                    yield block
                else:
                    await asyncio.sleep(LOG_POLL_S)

        return StreamingResponse(text(), media_type="text/plain; charset=utf-8")

    # ---- commands -------------------------------------------------------------------------------------------------

    async def add(self, request: Request, start: bool = True) -> dict[str, Any]:
        given = await _json_object(request, "A spec is a JSON object with at least `name` and `source`.")
        try:
            spec = ModelSpec.model_validate(given)
        except ValidationError as error:
            raise SpecError(_spec_problems(error)) from None
        await self._registry.add(spec, self._gpus(), start)
        self._loop.note(spec.name, "added", "added by API")
        await self._next_look()
        return self._model(spec.name)

    async def remove(self, name: str) -> dict[str, Any]:
        name = self._resolve(name)
        before = self._model(name)
        await self._registry.remove(name)
        self._loop.note(name, "removed", "removed by API")
        return before

    async def limit(self, name: str, request: Request) -> dict[str, Any]:
        name = self._registry.resolve(name)
        changes = await _json_object(
            request, f"Bounds are a JSON object with some of {', '.join(LIMIT_FIELDS)}; null gives one back to the spec."
        )
        try:
            await self._registry.limit(name, changes, self._gpus())
        except ValidationError as error:
            raise SpecError(_spec_problems(error)) from None
        self._loop.note(name, "limit", ", ".join(f"{field}: {'as in its spec' if v is None else v}" for field, v in changes.items()))
        await self._next_look()
        return self._model(name)

    async def start(self, name: str) -> dict[str, Any]:
        name = self._registry.resolve(name)
        await self._registry.hold(name, False)
        self._loop.note(name, "start", "asked for by API")
        return self._model(name)

    async def stop(self, name: str) -> dict[str, Any]:
        name = self._registry.resolve(name)
        await self._registry.hold(name, True)
        self._loop.note(name, "stop", "asked for by API")
        return self._model(name)

    async def _next_look(self) -> None:
        before = self._loop.view
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_TIMEOUT_S), self._loop.ticked:
                await self._loop.ticked.wait_for(lambda: self._loop.view is not before)

    # ---- projections ----------------------------------------------------------------------------------------------

    def _gpus(self) -> tuple[GpuReading, ...]:
        return tuple(self._loop.view.snapshot.gpus.values()) if self._loop.view else ()

    def _names(self) -> list[str]:
        """Registered models, and removed ones whose engine is not gone yet."""
        instances = self._loop.view.plan.instances if self._loop.view else {}
        return sorted(self._registry.known().keys() | instances.keys())

    def _resolve(self, name: str) -> str:
        return name if name in self._names() else self._registry.resolve(name)

    def _instance(self, name: str) -> Instance:
        found = self._loop.view.plan.instances.get(name) if self._loop.view else None
        return found or Instance(name, reason="just added")

    def _model(self, name: str) -> dict[str, Any]:
        known: Known | None = self._registry.known().get(name)
        instance, view, now = self._instance(name), self._loop.view, time.monotonic()
        launch = instance.launch if instance.state is not State.WAITING else None
        spec = known.spec if known else (instance.launch.spec if instance.launch else None)
        traffic = view.snapshot.traffic.get(name, TrafficSeen()) if view else TrafficSeen()
        seen = view.snapshot.engines.get(launch.id) if view and launch else None
        last_used = max(
            (at for at in (traffic.last_used, known.started_at if known else None) if at is not None and at > -1e9), default=None
        )
        failure = instance.failure
        return {
            "name": name,
            "source": spec.source if spec else None,
            "aliases": list(spec.aliases) if spec else [],
            "owner": known.owner if known else "removed",
            "state": instance.state.value,
            "since_s": round(max(0.0, now - instance.since), 1) if instance.since else 0.0,
            "reason": instance.reason,
            "held": known.held if known else True,
            "in_flight": traffic.in_flight,
            "waiting": traffic.waiting,
            "idle_s": 0.0 if traffic.in_flight else (round(now - last_used, 1) if last_used is not None else None),
            "spec": spec.model_dump(mode="json") if spec else {},
            "overrides": dict(known.overrides) if known else {},
            "engine": self._engine(instance, seen) if launch else None,
            "pool": self._pool(launch.id, seen) if launch else None,
            "failure": None
            if failure is None
            else {
                "reason": failure.reason,
                "log": list(failure.log),
                "count": instance.failures,
                "retry_in_s": round(max(0.0, instance.retry_at - now), 1) if instance.state is State.BACKOFF else None,
            },
            "footprint": _footprint(known) if known else None,
        }

    def _engine(self, instance: Instance, seen: EngineSeen | None) -> dict[str, Any]:
        view, launch = self._loop.view, instance.launch
        assert view is not None
        assert launch is not None
        phase = seen.phase if seen else self._about.phases[0]
        return {
            "launch_id": launch.id,
            "pid": seen.pid if seen else None,
            "ipc_name": launch.ipc_name,
            "socket": self._socket_of(launch.id),
            "log": str(self._log_file(instance.model) or ""),
            "phase": phase,
            "phase_index": self._about.phases.index(phase),
            "phase_count": len(self._about.phases),
            "gpus": list(launch.gpus),
            "gpu_indexes": [view.snapshot.gpus[uuid].index for uuid in launch.gpus if uuid in view.snapshot.gpus],
            "gpu_bytes": sum(view.snapshot.held_bytes(launch.id, uuid) for uuid in launch.gpus),
            "up_s": round(time.monotonic() - seen.started_at, 1) if seen else 0.0,
            "expected_start_s": launch.expected_start_s,
        }

    def _explained(self, model: str, launch_id: str) -> dict[str, Any]:
        view = self._loop.view
        assert view is not None
        pool = view.plan.pools[launch_id]
        shown = self._pool(launch_id, view.snapshot.engines.get(launch_id)) or {}
        more = {"target_bytes": pool.target_bytes, "demand_bytes": pool.demand_bytes, "charge_bytes": pool.charge_bytes}
        return {"model": model, "launch_id": launch_id, **shown, **more, "weight": pool.weight, "change": explain.change(pool)}

    def _pool(self, launch_id: str, seen: EngineSeen | None) -> dict[str, Any] | None:
        view = self._loop.view
        pool = view.plan.pools.get(launch_id) if view else None
        if pool is None or seen is None or seen.segment is None:
            return None
        return {
            "limit_bytes": pool.limit_bytes,
            "used_bytes": seen.segment.used_bytes,
            "prealloc_bytes": seen.segment.prealloc_bytes,
            "floor_bytes": pool.floor_bytes,
            "ceiling_bytes": pool.ceiling_bytes,
            "bundle_bytes": pool.bundle_bytes,
            "status": pool.status,
            "reason": pool.reason,
        }


async def _json_object(request: Request, else_said: str) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadRequest(else_said)
    return given


def _footprint(known: Known) -> dict[str, Any]:
    footprint = known.footprint
    return {
        "source": footprint.source,
        "total_bytes": footprint.start_bytes,
        "parts": dict(footprint.parts),
        "start_s": footprint.start_s,
    }


def _event(event: Event) -> dict[str, Any]:
    return {"at": event.at, "kind": event.kind, "reason": event.reason}


def _events(events: list[Event]) -> list[dict[str, Any]]:
    return [_event(event) for event in events]


def _without_clocks(model: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a change worth telling: not the seconds that pass."""
    engine = {k: v for k, v in model["engine"].items() if k not in ("up_s",)} if model["engine"] else None
    failure = {k: v for k, v in model["failure"].items() if k != "retry_in_s"} if model["failure"] else None
    return {k: v for k, v in model.items() if k not in ("since_s", "idle_s", "engine", "failure")} | {"engine": engine, "failure": failure}


def _spec_problems(error: ValidationError) -> list[Problem]:
    problems = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"] if "[" not in str(part)) or "spec"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"unknown field; a spec has: {', '.join(ModelSpec.model_fields)}"
        elif detail["type"] == "missing":
            message = "is missing"
        elif "error" not in detail.get("ctx", {}) and not isinstance(detail["input"], (dict, list)):
            message = f"{detail['input']!r}: {message[0].lower()}{message[1:]}"
        head = message.split(" ", 1)[0].rstrip(":")  # a check between fields names the one to mend first
        if field == "spec" and head in ModelSpec.model_fields:
            field, message = head, message.removeprefix(f"{head}: ")
        problems.append(Problem(field, message))
    return problems


def _tail(path: Path, lines: int) -> tuple[bytes, int]:
    """The last lines, and where the file ended. Reads backwards in blocks: logs may be large."""
    with open(path, "rb") as file:
        end = at = file.seek(0, os.SEEK_END)
        found = b""
        while at > 0 and found.count(b"\n") <= lines:
            at = max(0, at - LOG_BLOCK)
            file.seek(at)
            found = file.read(end - at)
    kept = found.splitlines(keepends=True)
    return b"".join(kept[-lines:] if lines else []), end


def _read_from(path: Path, at: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(at)
            return file.read(LOG_BLOCK)
    except FileNotFoundError:
        return b""
