"""The HTTP face: vLLM's routes, bodies and refusals. What an engine does is asked of EngineCore; nothing is kept here.

A client that leaves aborts its request, streamed or not. Development routes exist only in development mode.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import answers
from .answers import Answer, BadRequest, Json, ResponseAnswer, error_body, prompt_of, text_of, words
from .args import EngineArgs
from .client import DEAD, CallFailed, EngineClient, EngineDead
from .environment import Environment
from .faults import Faults
from .streams import Run, completion_chunks, last_of, reason_of, response_events, unless_gone

VERSION = "0.24.0"
_CHAT_DEFAULT_TOKENS = 64  # A real model stops by itself; this one after so many, with reason `stop`.
_COMPLETION_DEFAULT_TOKENS = 16

Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The routes of one engine."""

    def __init__(self, args: EngineArgs, env: Environment, client: EngineClient, max_model_len: int) -> None:
        self.faults = env.faults
        self._args = args
        self._name = args.served_names[0]
        self._client = client
        self._max_model_len = max_model_len
        self._dev_mode = env.dev_mode
        self._api_key = args.api_key or env.api_key

    def app(self) -> ASGIApp:
        routes = [
            _post("/v1/chat/completions", self._json(self._chat)),
            _post("/v1/completions", self._json(self._completions)),
            _post("/v1/responses", self._json(self._responses)),
            _post("/v1/embeddings", self._json(self._embeddings)),
            _post("/tokenize", self._json(self._tokenize)),
            _post("/detokenize", self._json(self._detokenize)),
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

    async def _chat(self, request: Request, body: Json) -> Response:
        if not isinstance(body.get("messages"), list):
            raise BadRequest("1 validation error: {'type': 'missing', 'loc': ('body', 'messages')}")
        prompt = "\n".join(text_of(message) for message in body["messages"])
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        return await self._complete(request, body, prompt, asked, chat=True)

    async def _completions(self, request: Request, body: Json) -> Response:
        if "prompt" not in body:
            raise BadRequest("1 validation error: {'type': 'missing', 'loc': ('body', 'prompt')}")
        return await self._complete(request, body, prompt_of(body["prompt"]), body.get("max_tokens"), chat=False)

    async def _complete(self, request: Request, body: Json, prompt: str, asked: Any, *, chat: bool) -> Response:
        default = _CHAT_DEFAULT_TOKENS if chat else _COMPLETION_DEFAULT_TOKENS
        run, own_end = self._start(body, prompt, asked, default)
        own_end = own_end and chat
        answer = Answer(self._name, len(prompt), chat)
        if body.get("stream"):
            options = body.get("stream_options") or {}
            chunks = completion_chunks(answer, run, own_end, with_usage=bool(options.get("include_usage")))
            return StreamingResponse(chunks, media_type="text/event-stream")

        async def whole() -> Response:
            tokens, reason = await last_of(run)
            body = answer.whole(words(self._name, 1, tokens), tokens, reason_of(reason, own_end))
            return JSONResponse(body)

        return await unless_gone(request, whole())

    async def _responses(self, request: Request, body: Json) -> Response:
        if "input" not in body:
            raise BadRequest("1 validation error: {'type': 'missing', 'loc': ('body', 'input')}")
        prompt = text_of(body.get("instructions") or "") + text_of(body["input"])
        run, _ = self._start(body, prompt, body.get("max_output_tokens"), _CHAT_DEFAULT_TOKENS)
        answer = ResponseAnswer(self._name, len(prompt))
        if body.get("stream"):
            return StreamingResponse(response_events(answer, run), media_type="text/event-stream")

        async def whole() -> Response:
            tokens, _ = await last_of(run)
            return JSONResponse(answer.whole(words(self._name, 1, tokens), tokens, "completed"))

        return await unless_gone(request, whole())

    def _start(self, body: Json, prompt: str, asked: Any, default: int) -> tuple[Run, bool]:
        """The running request, and whether it ends by itself (no length was asked for)."""
        if "error_500" in self.faults:
            raise BadRequest("Internal server error", kind="InternalServerError", status=500)
        length = self._max_model_len
        if asked is not None and (not isinstance(asked, int) or asked < 1):
            raise BadRequest(f"max_tokens must be at least 1, got {asked}.")
        wanted = asked or max(1, min(default, length - len(prompt)))
        if len(prompt) + wanted > length:
            raise BadRequest(
                f"This model's maximum context length is {length} tokens. However, you requested {wanted} output "
                f"tokens and your prompt contains {len(prompt)} input tokens, for a total of {len(prompt) + wanted} "
                "tokens. Please reduce the length of the input prompt or the number of requested output tokens."
            )
        if self._client.dead.is_set():
            raise EngineDead(DEAD)
        key = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
        return self._client.generate(max(1, len(prompt)), wanted, key), asked is None and not body.get("ignore_eos")

    async def _embeddings(self, request: Request, body: Json) -> Response:
        given = body.get("input", "")
        batch = isinstance(given, list) and not (given and isinstance(given[0], int))
        inputs = [prompt_of(part) for part in given] if batch else [prompt_of(given)]
        return JSONResponse(answers.embeddings(self._name, inputs, as_base64=body.get("encoding_format") == "base64"))

    async def _tokenize(self, request: Request, body: Json) -> Response:
        messages = body.get("messages")
        text = "\n".join(map(text_of, messages)) if messages else str(body.get("prompt", ""))
        tokens = [ord(character) for character in text]
        return JSONResponse({"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": None})

    async def _detokenize(self, request: Request, body: Json) -> Response:
        return JSONResponse({"prompt": prompt_of(body.get("tokens", []))})

    async def _models(self, request: Request) -> Response:
        return JSONResponse(answers.models(self._args.served_names, self._args.model, self._max_model_len))

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self._client.dead.is_set() else 200)

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(answers.metrics(self._name, self._client.stats))

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
        body = await _read_json(request)
        if "method" not in body:
            return JSONResponse({"detail": "Missing 'method' in request body"}, status_code=400)
        if not str(body["method"]).startswith("kv_"):
            raise CallFailed(f"AttributeError: 'Worker' object has no attribute '{body['method']}'")
        return JSONResponse({"results": [await self._client.call(body["method"], *body.get("args", []))]})

    async def _set_fault(self, request: Request) -> Response:
        body = await _read_json(request)
        try:
            faults = Faults.parse(str(body.get("set", "")))
        except ValueError as error:
            raise BadRequest(str(error)) from error
        await self._client.call("sim_fault", str(body.get("set", "")))
        self.faults = faults
        return JSONResponse({"faults": faults})

    def _json(self, handle: Callable[[Request, Json], Coroutine[Any, Any, Response]]) -> Handler:
        """Read the body as vLLM does: media type, JSON, and a model that is served here."""

        async def endpoint(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").lower().split(";", maxsplit=1)[0]
            if media_type != "application/json":
                raise BadRequest("Unsupported Media Type: Only 'application/json' is allowed", status=415)
            body = await _read_json(request)
            model = body.get("model")
            if model and model not in self._args.served_names:
                message = f"The model `{model}` does not exist."
                raise BadRequest(message, kind="NotFoundError", status=404, param="model")
            return await handle(request, body)

        return endpoint


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


async def _read_json(request: Request) -> Json:
    try:
        body = json.loads(await request.body())
    except (ValueError, ClientDisconnect) as error:
        raise BadRequest(f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        message = f"'{type(body).__name__}' object has no attribute 'get'"
        raise BadRequest(message, kind="InternalServerError", status=500)  # as vLLM 0.24 does
    return body


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(error.body, status_code=error.status)


async def _on_internal(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error), "InternalServerError", 500), status_code=500)


async def _on_missing(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "Not Found"}, status_code=404)


_HANDLERS: dict[Any, Callable[[Request, Exception], Coroutine[Any, Any, Response]]] = {
    BadRequest: _on_bad_request,
    EngineDead: _on_internal,
    CallFailed: _on_internal,
    404: _on_missing,
}


def _get(path: str, handler: Handler) -> Route:
    return Route(path, handler, methods=["GET"])


def _post(path: str, handler: Handler) -> Route:
    return Route(path, handler, methods=["POST"])
