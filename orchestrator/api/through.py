"""/upstream/{model}/…: any route of that model's engine, past the table, for operators only (/metrics, /version, /tokenizer_info).

It goes to the engine that is there, also to one that sleeps. It holds no lease, so it wakes nobody and is no use of the model; what a
development route does to an engine is not what the loop was told.
"""

import contextlib
from collections.abc import Callable
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.api.proxy import Proxy
from orchestrator.control.reconciler import Reconciler
from orchestrator.errors import Conflict, ModelNotFound

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Through:
    """`resolve`: name or alias -> model, raising ModelNotFound."""

    def __init__(self, proxy: Proxy, resolve: Callable[[str], str], reconciler: Reconciler) -> None:
        self._proxy, self._resolve, self._loop = proxy, resolve, reconciler

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/upstream/{target:path}", self.forward, methods=METHODS)
        return router

    async def forward(self, target: str, request: Request) -> Response:
        model, path = self._split(target)
        instance = self._loop.view.plan.instances.get(model) if self._loop.view else None
        if instance is None or instance.launch is None:
            state = instance.state if instance else "stopped"
            raise Conflict(f"{model!r} has no engine now, it is {state}: `orchestratorctl load {model}` starts one.", param="model")
        return _Forwarded(self._proxy, quote(path, safe="/:@!$&'()*+,;=~"), model, instance.launch.id)

    def _split(self, target: str) -> tuple[str, str]:
        """A name may have slashes: the longest that there is. Raises ModelNotFound."""
        words = target.split("/")
        for count in range(len(words), 1, -1):
            with contextlib.suppress(ModelNotFound):
                return self._resolve("/".join(words[:count])), "/" + "/".join(words[count:])
        return self._resolve(words[0]), "/" + "/".join(words[1:])


class _Forwarded(Response):
    """The engine's answer, as it comes."""

    def __init__(self, proxy: Proxy, path: str, model: str, launch_id: str) -> None:
        super().__init__()
        self._proxy, self._path, self._model, self._launch_id = proxy, path, model, launch_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._proxy.straight(scope, receive, send, self._path, self._model, self._launch_id)
