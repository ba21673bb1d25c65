"""The HTTP face: what an engine says of itself, and its development routes, only in development mode. What users ask: see inference.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answers, messages
from .answers import BadRequest, error_body
from .args import EngineArgs
from .client import CallFailed, EngineClient, EngineDead
from .environment import Environment
from .faults import Faults
from .inference import Inference, read_json

VERSION = "0.24.0"

Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The routes of one engine."""

    def __init__(self, args: EngineArgs, env: Environment, client: EngineClient, max_model_len: int) -> None:
        self.faults = env.faults
        self._inference = Inference(args.served_names, client, max_model_len, lambda: self.faults, env.keeps_responses)
        self._args = args
        self._name = args.served_names[0]
        self._client = client
        self._max_model_len = max_model_len
        self._dev_mode = env.dev_mode
        self._api_key = args.api_key or env.api_key

    def app(self) -> ASGIApp:
        routes: list[BaseRoute] = [
            *self._inference.routes(),
            _get("/v1/models", self._models),
            _get("/health", self._health),
            _get("/version", self._version),
            _get("/metrics", self._metrics),
            Route("/ping", self._health, methods=["GET", "POST"]),
        ]
        if self._dev_mode:
            routes += [
                _post("/sleep", self._sleep),
                _post("/wake_up", self._wake_up),
                _get("/is_sleeping", self._is_sleeping),
                _post("/reset_prefix_cache", self._reset_prefix_cache),
                _post("/collective_rpc", self._collective_rpc),
                _post("/sim/fault", self._set_fault),
            ]
        return _Front(Starlette(routes=routes, exception_handlers=_HANDLERS), self._api_key)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(answers.models(self._args.served_names, self._args.model, self._max_model_len))

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self._client.dead.is_set() else 200)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def _metrics(self, request: Request) -> Response:
        counted = not self._args.non_default.get("disable_log_stats")
        return PlainTextResponse(answers.metrics(self._name, self._client.stats) if counted else "")

    async def _sleep(self, request: Request) -> Response:
        await self._client.call("sleep", int(request.query_params.get("level", "1")))
        return Response(status_code=200)

    async def _wake_up(self, request: Request) -> Response:
        await self._client.call("wake_up", request.query_params.getlist("tags") or None)
        return Response(status_code=200)

    async def _is_sleeping(self, request: Request) -> Response:
        return JSONResponse({"is_sleeping": await self._client.call("is_sleeping")})

    async def _reset_prefix_cache(self, request: Request) -> Response:
        await self._client.call("reset_prefix_cache")
        return Response(status_code=200)

    async def _collective_rpc(self, request: Request) -> Response:
        body = await read_json(request)
        if "method" not in body:
            return JSONResponse({"detail": "Missing 'method' in request body"}, status_code=400)
        if not str(body["method"]).startswith("kv_"):
            raise CallFailed(f"AttributeError: 'Worker' object has no attribute '{body['method']}'")
        return JSONResponse({"results": [await self._client.call(body["method"], *body.get("args", []))]})

    async def _set_fault(self, request: Request) -> Response:
        body = await read_json(request)
        try:
            faults = Faults.parse(str(body.get("set", "")))
        except ValueError as error:
            raise BadRequest(str(error)) from error
        await self._client.call("sim_fault", str(body.get("set", "")))
        self.faults = faults
        return JSONResponse({"faults": faults})


class _Front:
    """Around all routes: the API key on `/v1` paths only, as in vLLM, and the request id echoed."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}" if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id")

        async def send_with_id(message: Message) -> None:
            if request_id is not None and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if self._expected and scope["path"].startswith("/v1") and headers.get("authorization") != self._expected:
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    body = messages.refused(error) if request.url.path.startswith("/v1/messages") else error.body
    return JSONResponse(body, status_code=error.status)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A field of another type than it should be: vLLM's models refuse it before anybody looks."""
    return await _on_bad_request(request, BadRequest(f"1 validation error: {error}"))


async def _on_internal(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error), "InternalServerError", 500), status_code=500)


async def _on_missing(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "Not Found"}, status_code=404)


_HANDLERS: dict[Any, Callable[[Request, Exception], Coroutine[Any, Any, Response]]] = {
    BadRequest: _on_bad_request,
    **dict.fromkeys((AttributeError, OverflowError, TypeError, ValueError), _on_invalid),
    EngineDead: _on_internal,
    CallFailed: _on_internal,
    404: _on_missing,
}


def _get(path: str, handler: Handler) -> Route:
    return Route(path, handler, methods=["GET"])


def _post(path: str, handler: Handler) -> Route:
    return Route(path, handler, methods=["POST"])
