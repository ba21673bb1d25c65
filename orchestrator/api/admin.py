"""The operators' routes, what orchestratorctl talks to: projections of the registry and of the loop's last look, and few commands.

A command changes the registry and wakes the loop; what becomes of it is watched, not awaited. Only `add` and `limit` await one look
of the loop: a request right behind the answer must find the model's door. Whoever is refused is told why, and what to do instead.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from orchestrator import __version__
from orchestrator.api import logs, projections
from orchestrator.api.projections import Json
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import LIMIT_FIELDS, Registry
from orchestrator.errors import BadRequest, Conflict, ModelNotFound, SpecError
from orchestrator.policy.instance import State
from orchestrator.policy.lifecycle import Want
from orchestrator.policy.model import ModelSpec

LOOK_TIMEOUT_S = 5.0  # a look takes milliseconds, 2 s where the driver hangs
VERBS = ("start", "stop", "load", "unload", "sleep", "wake", "drain", "pin", "unpin")
COULD_DRAIN = frozenset({State.READY, State.DRAINING, State.STOPPING})  # with requests; without them it can be unloaded in any state
COULD_SLEEP = frozenset({State.READY, State.DRAINING, State.ASLEEP, State.WAKING})


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
    state_problem: Callable[[], str | None] = lambda: None
    host_budget_bytes: int | None = None  # of host memory, for all that sleep
    engines: Mapping[str, Json] = field(default_factory=dict)  # the engine venvs, by name


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
        launch_servers: Callable[[], Awaitable[Mapping[str, Any]]] | None = None,
    ) -> None:
        """`who`: pid -> its user and program, for people. `launch_servers`: those that fork engines, by engine venv."""
        self._registry, self._loop, self._about = registry, reconciler, about
        self._log_file, self._events, self._who = log_file, events, who
        self._launch_servers = launch_servers
        self._places = projections.Places(socket_of, log_file, about.phases)

    def heed(self, host_budget_bytes: int) -> None:
        self._about = replace(self._about, host_budget_bytes=host_budget_bytes)

    def router(self) -> APIRouter:
        """A verb that is added here is a word that no name may end with: policy/model.py, ROUTE_WORDS."""
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/status", self.status, methods=["GET"])
        router.add_api_route("/explain", self.explain, methods=["GET"])
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models", self.add, methods=["POST"], status_code=201)
        for verb in VERBS:
            router.add_api_route(f"/models/{{name:path}}/{verb}", getattr(self, verb), methods=["POST"], status_code=202)
        router.add_api_route("/models/{name:path}/limit", self.limit, methods=["POST"])
        router.add_api_route("/models/{name:path}/adapters", self.adapters, methods=["POST"])
        router.add_api_route("/models/{name:path}/plan", self.plan, methods=["GET"])
        router.add_api_route("/models/{name:path}/watch", self.watch, methods=["GET"])
        router.add_api_route("/models/{name:path}/logs", self.logs, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.describe, methods=["GET"])
        router.add_api_route("/models/{name:path}", self.remove, methods=["DELETE"], status_code=202)
        return router

    # ---- questions ------------------------------------------------------------------------------------------------

    async def status(self) -> Json:
        view, about, known = self._loop.view, self._about, self._registry.known()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - about.started_at, 1),
            "listen": about.listen(),
            "admin_socket": about.admin_socket,
            "gpu_source": about.gpu_source,
            "config": list(about.config),
            "state_dir": about.state_dir,
            "state_problem": about.state_problem(),
            "models": projections.counts(known, view),
            "engines": dict(about.engines),
            "launch_servers": await self._launch_servers() if self._launch_servers else {},
            "host": projections.host(known, view, about.host_budget_bytes),
            "gpus": projections.budgets(view),
            "loop": {
                "ticks": view.ticks if view else 0,
                "last_ms": round(1000 * view.took_s, 3) if view else None,
                "errors": view.errors if view else 0,
            },
        }

    async def explain(self) -> Json:
        return {"gpus": projections.explained(self._loop.view, self._who)}

    async def models(self) -> Json:
        return {"models": [self._model(name) for name in projections.names(self._registry.known(), self._loop.view)]}

    async def describe(self, name: str) -> Json:
        name = self._resolve(name)
        return {**self._model(name), "events": [projections.event(event) for event in await self._events(name, 50)]}

    async def plan(self, name: str) -> Json:
        """What loading it would do now, and nothing done."""
        name = self._registry.resolve(name)
        return projections.plan(name, self._loop.preview(name), self._registry.get(name).held)

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
                telling = projections.without_clocks(model)
                if telling != last:
                    last = telling
                    yield msgspec.json.encode(model) + b"\n"
                async with self._loop.ticked:
                    if self._loop.over:
                        return
                    await self._loop.ticked.wait()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def logs(self, name: str, tail: int = Query(100, ge=0, le=logs.MAX_TAIL), follow: bool = False) -> StreamingResponse:
        name = self._resolve(name)
        if self._log_file(name) is None and not follow:
            raise ModelNotFound(f"The model {name!r} has no log: it was never started.", code="no_log")
        return StreamingResponse(logs.read(lambda: self._log_file(name), tail, follow), media_type="text/plain; charset=utf-8")

    # ---- commands -------------------------------------------------------------------------------------------------

    async def add(self, request: Request, start: bool = True) -> Json:
        given = await json_object(request, "A spec is a JSON object with at least `name` and `source`.")
        try:
            spec = ModelSpec.model_validate(given)
        except ValidationError as error:
            raise SpecError(projections.spec_problems(error.errors())) from None
        await self._registry.add(spec, projections.gpus(self._loop.view), start)
        self._loop.note(spec.name, "added", "added by API")
        await next_look(self._loop)
        return self._model(spec.name)

    async def remove(self, name: str) -> Json:
        name = self._resolve(name)
        before = self._model(name)
        await self._registry.remove(name)
        self._loop.note(name, "removed", "removed by API")
        return before

    async def limit(self, name: str, request: Request) -> Json:
        name = self._registry.resolve(name)
        changes = await json_object(
            request, f"Bounds are a JSON object with some of {', '.join(LIMIT_FIELDS)}; null gives one back to the spec."
        )
        try:
            await self._registry.limit(name, changes, projections.gpus(self._loop.view))
        except ValidationError as error:
            raise SpecError(projections.spec_problems(error.errors())) from None
        self._loop.note(name, "limit", ", ".join(f"{field}: {'as in its spec' if v is None else v}" for field, v in changes.items()))
        await next_look(self._loop)
        return self._model(name)

    async def adapters(self, name: str, request: Request) -> Json:
        name = self._registry.resolve(name)
        changes = await json_object(request, "Adapters are a JSON object: name -> Hub id or folder, or null to remove it.")
        if wrong := [adapter for adapter, source in changes.items() if not isinstance(source, str | None)]:
            raise BadRequest(f"The source of the adapter {wrong[0]!r} is {changes[wrong[0]]!r}: write a Hub id, a folder, or null.")
        await self._registry.adapt(name, changes, projections.gpus(self._loop.view))
        self._loop.note(name, "adapters", ", ".join(f"{adapter}: {source or 'removed'}" for adapter, source in changes.items()))
        return self._model(name)

    async def start(self, name: str) -> Json:
        name = self._registry.resolve(name)
        await self._registry.hold(name, False)
        return self._noted(name, "start")

    async def stop(self, name: str) -> Json:
        name = self._registry.resolve(name)
        await self._registry.hold(name, True)
        return self._noted(name, "stop")

    async def load(self, name: str) -> Json:
        name = self._registry.resolve(name)
        self._registry.want(name)
        return self._noted(name, "load")

    async def wake(self, name: str) -> Json:
        name = self._registry.resolve(name)
        state = projections.instance(name, self._loop.view).state
        if state in (State.STOPPED, State.FAILED) and not self._registry.get(name).held:  # held: said by want()
            raise Conflict(f"{name!r} is {state.value}, not asleep: `orchestratorctl load {name}` starts it.", param="name")
        self._registry.want(name)
        return self._noted(name, "wake")

    async def unload(self, name: str) -> Json:
        name = self._registry.resolve(name)
        self._refuse_busy(name, "be unloaded")
        self._registry.rest(name, Want.NOTHING)
        return self._noted(name, "unload")

    async def sleep(self, name: str) -> Json:
        name = self._registry.resolve(name)
        spec, instance = self._registry.get(name).spec, projections.instance(name, self._loop.view)
        if not spec.sleep_level or (instance.launch and not instance.launch.spec.sleep_level):
            raise Conflict(f"{name!r} can not sleep: it has sleep_level 0. `orchestratorctl unload {name}` frees its memory.", param="name")
        if instance.state is State.STARTING:
            raise Conflict(f"{name!r} is starting: it can sleep once it is ready; `orchestratorctl unload {name}` ends it.", param="name")
        if instance.state not in COULD_SLEEP:
            raise Conflict(f"{name!r} is {instance.state.value}: there is nothing that could sleep.", param="name")
        self._refuse_busy(name, "sleep")
        self._registry.rest(name, Want.ASLEEP)
        return self._noted(name, "sleep")

    async def drain(self, name: str) -> Json:
        name = self._registry.resolve(name)
        instance, waiting = projections.instance(name, self._loop.view), self._loop.requests(name).waiting
        if waiting and (instance.state not in COULD_DRAIN or instance.sent_at is not None) and not self._registry.get(name).held:
            state = "falling asleep" if instance.sent_at is not None else instance.state.value
            wait = f"{waiting} request{'s wait' if waiting > 1 else ' waits'} for it"
            instead = f"drain it when it is ready, or `orchestratorctl stop {name}` turns them away"
            raise Conflict(f"{name!r} is {state}, and {wait}, which would only bring it back: {instead}.", param="name", code="busy")
        self._registry.drain(name)
        return self._noted(name, "drain")

    async def pin(self, name: str) -> Json:
        name = self._registry.resolve(name)
        await self._registry.pin(name, True, projections.gpus(self._loop.view))
        return self._noted(name, "pin")

    async def unpin(self, name: str) -> Json:
        name = self._registry.resolve(name)
        await self._registry.pin(name, False, projections.gpus(self._loop.view))
        return self._noted(name, "unpin")

    def _noted(self, name: str, verb: str) -> Json:
        self._loop.note(name, verb, "asked for by API")
        return self._model(name)

    def _refuse_busy(self, name: str, what: str) -> None:
        requests = self._loop.requests(name)
        if count := requests.in_flight + requests.waiting:
            has = f"{name!r} has {count} request{'s' if count > 1 else ''}"
            raise Conflict(f"{has}: it can not {what} now; `orchestratorctl drain {name}` lets them end first.", param="name", code="busy")

    # ---- names, and the next look -----------------------------------------------------------------------------------

    def _resolve(self, name: str) -> str:
        """Also that of a removed model whose engine is not gone yet."""
        return name if name in projections.names(self._registry.known(), self._loop.view) else self._registry.resolve(name)

    def _model(self, name: str) -> Json:
        return projections.model(name, self._registry.known(), self._loop.view, self._places)


async def next_look(loop: Reconciler) -> None:
    """Until the loop has looked once more: what was changed is in force then."""
    before = loop.view
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK_TIMEOUT_S), loop.ticked:
            await loop.ticked.wait_for(lambda: loop.over or loop.view is not before)


def refuse_unknown(given: Json, known: Collection[str], shape: str) -> None:
    """Raises BadRequest where it has a field that nobody would read."""
    if unknown := given.keys() - known:
        raise BadRequest(f"There is no {min(unknown)!r} in it. {shape}", param=min(unknown))


async def json_object(request: Request, else_said: str) -> Json:
    """The body. Raises BadRequest; `else_said` where it is JSON and no object."""
    try:
        given = msgspec.json.decode(await request.body())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadRequest(else_said)
    return given
