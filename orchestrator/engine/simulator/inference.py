"""What users ask of an engine: vLLM's inference routes, their bodies and refusals. What it takes is asked of EngineCore.

A client that leaves aborts its request, streamed or not. A real engine has the routes of its model's task; this one has all of them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute

from . import inventions, pooling, streams, uploads
from .answers import Answer, BadRequest, Json, prompt_of, text_of, words
from .client import DEAD, EngineClient, EngineDead
from .faults import Faults
from .messages import MessageAnswer
from .realtime import Realtime
from .responses import ResponseAnswer, Store
from .streams import Run, last_of, reason_of, unless_gone

_CHAT_DEFAULT_TOKENS = 64  # A real model stops by itself; this one after so many, with reason `stop`.
_COMPLETION_DEFAULT_TOKENS = 16

Handler = Callable[[Request], Awaitable[Response]]
Handle = Callable[[Request, Json], Coroutine[Any, Any, Response]]


class Inference:
    def __init__(
        self, names: list[str], client: EngineClient, max_model_len: int, faults: Callable[[], Faults], keeps_responses: bool
    ) -> None:
        self._names, self._name, self._client = names, names[0], client
        self._max_model_len, self._faults = max_model_len, faults
        self._store = Store(keeps_responses)

    def routes(self) -> list[BaseRoute]:
        handles: dict[str, Handle] = {
            "/v1/chat/completions": self._chat,
            "/v1/chat/completions/batch": self._batch,
            "/v1/chat/completions/render": self._tokenize,
            "/v1/chat/completions/derender": self._detokenize,
            "/v1/completions": self._completions,
            "/v1/completions/render": self._tokenize,
            "/v1/completions/derender": self._detokenize,
            "/v1/responses": self._responses,
            "/v1/messages": self._messages,
            "/v1/messages/count_tokens": self._count_tokens,
            "/v1/embeddings": self._embeddings,
            "/v2/embed": self._embed,
            "/pooling": self._pooling,
            "/classify": self._classify,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            **dict.fromkeys(("/score", "/v1/score"), self._score),
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), self._rerank),
        }
        return [
            *(Route(path, self._json(handle), methods=["POST"]) for path, handle in handles.items()),
            *(Route(f"/v1/audio/{task}", self._transcribe, methods=["POST"]) for task in ("transcriptions", "translations")),
            Route("/v1/responses/{id}", self._response, methods=["GET"]),
            Route("/v1/responses/{id}/cancel", self._cancel_response, methods=["POST"]),
            WebSocketRoute("/v1/realtime", Realtime(self._names).serve),
        ]

    # ---- text -----------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request, body: Json) -> Response:
        prompt = _conversation(body.get("messages"))
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        return await self._complete(request, body, prompt, asked, chat=True)

    async def _completions(self, request: Request, body: Json) -> Response:
        if "prompt" not in body:
            raise _missing("prompt")
        return await self._complete(request, body, prompt_of(body["prompt"]), body.get("max_tokens"), chat=False)

    async def _complete(self, request: Request, body: Json, prompt: str, asked: Any, *, chat: bool) -> Response:
        run, own_end = self._start(body, prompt, asked, _CHAT_DEFAULT_TOKENS if chat else _COMPLETION_DEFAULT_TOKENS)
        own_end = own_end and chat
        answer = (
            Answer(self._name, len(prompt), chat, inventions.tool_call(body), inventions.structured(body))
            if chat
            else Answer(self._name, len(prompt), chat)
        )
        if body.get("stream"):
            options = body.get("stream_options") or {}
            return _events(streams.completion_chunks(answer, run, own_end, with_usage=bool(options.get("include_usage"))))

        async def whole() -> Response:
            tokens, reason = await last_of(run)
            body = answer.whole(words(self._name, 1, tokens), tokens, reason_of(reason, own_end))
            return JSONResponse(body)

        return await unless_gone(request, whole())

    async def _batch(self, request: Request, body: Json) -> Response:
        if not isinstance(body.get("messages"), list):
            raise _missing("messages")
        prompts = [_conversation(messages) for messages in body["messages"]]
        runs = [self._start(body, prompt, body.get("max_tokens"), _CHAT_DEFAULT_TOKENS) for prompt in prompts]
        choices = []
        for index, (run, own_end) in enumerate(runs):
            tokens, reason = await last_of(run)
            whole = Answer(self._name, len(prompts[index]), True).whole(words(self._name, 1, tokens), tokens, reason_of(reason, own_end))
            choices.append({**whole["choices"][0], "index": index})
        return JSONResponse({**whole, "choices": choices} if choices else {"choices": []})

    async def _messages(self, request: Request, body: Json) -> Response:
        if "max_tokens" not in body:
            raise _missing("max_tokens")
        prompt = text_of(body.get("system") or "") + _conversation(body.get("messages"))
        run, _ = self._start(body, prompt, body["max_tokens"], _CHAT_DEFAULT_TOKENS)
        answer = MessageAnswer(self._name, len(prompt))
        if body.get("stream"):
            return _events(streams.message_events(answer, run))

        async def whole() -> Response:
            tokens, reason = await last_of(run)
            return JSONResponse(answer.whole(words(self._name, 1, tokens), tokens, reason))

        return await unless_gone(request, whole())

    async def _count_tokens(self, request: Request, body: Json) -> Response:
        return JSONResponse({"input_tokens": len(text_of(body.get("system") or "") + _conversation(body.get("messages")))})

    async def _responses(self, request: Request, body: Json) -> Response:
        if "input" not in body:
            raise _missing("input")
        background = bool(body.get("background"))
        if background and not self._store.enabled:
            raise BadRequest("This vLLM engine does not support `store=True`.", param="background")
        if body.get("previous_response_id"):
            self._store.get(body["previous_response_id"])
        prompt = text_of(body.get("instructions") or "") + text_of(body["input"])
        run, _ = self._start(body, prompt, body.get("max_output_tokens"), _CHAT_DEFAULT_TOKENS)
        answer = ResponseAnswer(self._name, len(prompt), background)
        if body.get("stream"):
            return _events(streams.response_events(answer, run, self._store.keep))

        async def finished() -> Json:
            tokens, _ = await last_of(run)
            return answer.whole(words(self._name, 1, tokens), tokens, "completed")

        if background:
            begun = answer.whole(None, 0, "queued")

            async def finish() -> None:
                self._store.keep(await finished())

            self._store.begin(begun, finish())
            return JSONResponse(begun)

        async def whole() -> Response:
            done = await finished()
            self._store.keep(done)
            return JSONResponse(done)

        return await unless_gone(request, whole())

    async def _response(self, request: Request) -> Response:
        return JSONResponse(self._store.get(request.path_params["id"]))

    async def _cancel_response(self, request: Request) -> Response:
        return JSONResponse(self._store.cancel(request.path_params["id"]))

    def _start(self, body: Json, prompt: str, asked: Any, default: int) -> tuple[Run, bool]:
        """The running request, and whether it ends by itself (no length was asked for)."""
        if "error_500" in self._faults():
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

    # ---- sound ----------------------------------------------------------------------------------------------------

    async def _transcribe(self, request: Request) -> Response:
        upload = await uploads.read(request)
        self._check(upload.fields.get("model"))
        run, _ = self._start({}, "", upload.seconds, 1)
        if upload.streams:
            return _events(streams.transcription_chunks(self._name, run))

        async def whole() -> Response:
            tokens, _ = await last_of(run)
            return JSONResponse(uploads.whole(words(self._name, 1, tokens), upload))

        return await unless_gone(request, whole())

    # ---- no text --------------------------------------------------------------------------------------------------

    async def _embeddings(self, request: Request, body: Json) -> Response:
        return JSONResponse(pooling.embeddings(self._name, _inputs(body), as_base64=body.get("encoding_format") == "base64"))

    async def _embed(self, request: Request, body: Json) -> Response:
        return JSONResponse(pooling.embed(self._name, list(map(str, body.get("texts") or []))))

    async def _pooling(self, request: Request, body: Json) -> Response:
        return JSONResponse(pooling.pooled(self._name, _inputs(body)))

    async def _classify(self, request: Request, body: Json) -> Response:
        return JSONResponse(pooling.classes(self._name, _inputs(body)))

    async def _score(self, request: Request, body: Json) -> Response:
        left, right = (_listed(body.get(new, body.get(old, ""))) for new, old in (("queries", "text_1"), ("documents", "text_2")))
        return JSONResponse(pooling.scores(self._name, left, right))

    async def _rerank(self, request: Request, body: Json) -> Response:
        if "query" not in body or "documents" not in body:
            raise _missing("query")
        return JSONResponse(pooling.ranks(self._name, str(body["query"]), _listed(body["documents"]), int(body.get("top_n") or 0)))

    async def _tokenize(self, request: Request, body: Json) -> Response:
        messages = body.get("messages")
        text = "\n".join(map(text_of, messages)) if messages else str(body.get("prompt", ""))
        tokens = [ord(character) for character in text]
        return JSONResponse({"count": len(tokens), "max_model_len": self._max_model_len, "tokens": tokens, "token_strs": None})

    async def _detokenize(self, request: Request, body: Json) -> Response:
        return JSONResponse({"prompt": prompt_of(body.get("tokens", []))})

    # ---- what they have in common ---------------------------------------------------------------------------------

    def _json(self, handle: Handle) -> Handler:
        """Read the body as vLLM does: media type, JSON, and a model that is served here."""

        async def endpoint(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").lower().split(";", maxsplit=1)[0]
            if media_type != "application/json":
                raise BadRequest("Unsupported Media Type: Only 'application/json' is allowed", status=415)
            body = await read_json(request)
            self._check(body.get("model"))
            return await handle(request, body)

        return endpoint

    def _check(self, model: object) -> None:
        if model and model not in self._names:
            raise BadRequest(f"The model `{model}` does not exist.", kind="NotFoundError", status=404, param="model")


async def read_json(request: Request) -> Json:
    try:
        body = json.loads(await request.body())
    except (ValueError, ClientDisconnect) as error:
        raise BadRequest(f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        message = f"'{type(body).__name__}' object has no attribute 'get'"
        raise BadRequest(message, kind="InternalServerError", status=500)  # as vLLM 0.24 does
    return body


def _events(parts: Any) -> StreamingResponse:
    return StreamingResponse(parts, media_type="text/event-stream")


def _missing(field: str) -> BadRequest:
    return BadRequest(f"1 validation error: {{'type': 'missing', 'loc': ('body', '{field}')}}")


def _conversation(messages: Any) -> str:
    if not isinstance(messages, list):
        raise _missing("messages")
    return "\n".join(text_of(message) for message in messages)


def _inputs(body: Json) -> list[str]:
    given = body.get("input", "")
    batch = isinstance(given, list) and not (given and isinstance(given[0], int))
    return [prompt_of(part) for part in given] if batch else [prompt_of(given)]


def _listed(given: Any) -> list[str]:
    return [text_of(one) for one in given] if isinstance(given, list) else [text_of(given)]
