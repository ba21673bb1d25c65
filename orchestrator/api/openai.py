"""The users' routes: /v1/models from the registry, everything else forwarded. Only paths listed here reach an engine."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.types import ASGIApp

from orchestrator.api.proxy import Proxy
from orchestrator.control.reconciler import Reconciler
from orchestrator.control.registry import Registry

# An allow-list: engines run with development endpoints (sleep, collective_rpc, …) that nobody may reach through us.
FORWARDED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize")


def forwarded(proxy: Proxy) -> dict[str, ASGIApp]:
    """By path: what answers a POST there."""
    return dict.fromkeys(FORWARDED, proxy)


def models_router(registry: Registry, reconciler: Reconciler, started_at: Callable[[], float]) -> APIRouter:
    router = APIRouter()

    def one(name: str) -> dict[str, Any]:
        known = registry.get(name)
        view = reconciler.view
        instance = view.plan.instances.get(known.spec.name) if view else None
        return {
            "id": known.spec.name,
            "object": "model",
            "created": int(started_at()),
            "owned_by": "orchestrator",
            "aliases": list(known.spec.aliases),
            "state": instance.state.value if instance else "stopped",
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [one(name) for name in sorted(registry.known())]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return one(name)

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The daemon's own: answers as long as its event loop does."""
        return {"status": "ok"}

    return router
