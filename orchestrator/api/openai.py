"""The users' routes: /v1/models from the registry, and the table of those that are forwarded."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.types import ASGIApp

from orchestrator.api import asking
from orchestrator.api.proxy import Proxy
from orchestrator.api.realtime import Realtime
from orchestrator.api.routes import TABLE, Model, Route
from orchestrator.control.keys import Caller, Keys
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry


def forwarded(proxy: Proxy, realtime: Realtime) -> dict[Route, ASGIApp]:
    """What answers at each route of the table."""
    others: dict[Model, ASGIApp] = {Model.ID: proxy.by_id, Model.TALK: realtime}
    return {route: others.get(route.model) or partial(proxy, route) for route in TABLE}


def models_router(registry: Registry, reconciler: Reconciler, started_at: Callable[[], float], keys: Keys) -> APIRouter:
    router = APIRouter()

    def caller_of(request: Request) -> Caller:
        return asking.caller_of(keys, request.scope, dict(request.scope["headers"]))

    def one(name: str) -> dict[str, Any]:
        known = registry.get(name)
        view = reconciler.view
        instance = view.plan.instances.get(known.spec.name) if view else None
        return {
            "id": name if name in known.spec.adapters else known.spec.name,
            "object": "model",
            "created": int(started_at()),
            "owned_by": "orchestrator",
            "aliases": list(known.spec.aliases),
            **({"parent": known.spec.name} if name in known.spec.adapters else {}),
            "state": instance.state.value if instance else "stopped",
        }

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        seen = [known.spec for name, known in registry.known().items() if caller.allows(name)]
        return {"object": "list", "data": [one(name) for name in sorted(name for spec in seen for name in (spec.name, *spec.adapters))]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        caller_of(request).resolve(registry.resolve, name)
        return one(name)

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The daemon's own: answers as long as its event loop does."""
        return {"status": "ok"}

    return router
