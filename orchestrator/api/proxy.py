"""Requests for a model, on their way to its engine and back: one pure ASGI endpoint, the hot path.

The same bytes go on and raw bytes come back; nothing is parsed but the name in `model`. The endpoint watches receive() itself,
so a client that leaves cancels its upstream request in every phase: queued, before the first byte, mid-stream. However a
request ends, its lease comes back.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable

import aiohttp
import msgspec
from multidict import CIMultiDict
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from orchestrator.api import error_body
from orchestrator.control.traffic import Ask, Traffic
from orchestrator.errors import BadRequest, BodyTooLarge, EngineDied, OrchestratorError

# Hop-by-hop (RFC 9110 7.6.1), or made anew on each hop; and a client's credentials, which are no engine's business.
DROPPED_REQUEST = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host content-length expect"
    b" authorization x-api-key cookie".split()
)
DROPPED_RESPONSE = frozenset(b"connection keep-alive te trailer transfer-encoding upgrade server date".split())
# What aiohttp would add by itself: an engine is told what the client said, no more (an unasked Accept-Encoding may be obeyed).
NOT_ADDED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
# Engines close idle connections after 75 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a pool must give up earlier, or POSTs fail.
KEEP_ALIVE_S = 60.0
UNBOUNDED_TOKENS = 1 << 30
COUNT_DIGITS = 9  # of a count of tokens that is one; a larger number is no bound
ABSENT = msgspec.Raw(b"")
LIKELY_TOKENS = 256  # of an answer, for guessing what a queue needs
NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)  # a generation may take hours


class _Peek(msgspec.Struct):
    """All that is looked at of a body. Lengths are not even decoded here: whether they are right is the engine's to say."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT


_decode = msgspec.json.Decoder(_Peek).decode


class Proxy:
    """`resolve`: name or alias -> model, raising ModelNotFound. `socket_of`: launch id -> path of the engine's socket."""

    def __init__(self, traffic: Traffic, resolve: Callable[[str], str], socket_of: Callable[[str], str], max_body_bytes: int) -> None:
        self._traffic, self._resolve, self._socket_of, self._max_body = traffic, resolve, socket_of, max_body_bytes
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(scope, receive, self._max_body)
            if body is None:
                return  # the client left
            peek = _peek(body)
            model = self._resolve(peek.model)  # type: ignore[arg-type]  # _peek has seen that it is a string
        except OrchestratorError as error:
            await _send_error(send, error)
            return
        await _unless_client_leaves(self._serve(scope, send, model, body, _ask(peek, len(body))), receive)

    async def _serve(self, scope: Scope, send: Send, model: str, body: bytes, ask: Ask) -> None:
        try:
            async with self._traffic.lease(model, ask) as launch_id:
                await self._forward(scope, send, model, launch_id, body)
        except OrchestratorError as error:
            await _send_error(send, error)

    async def _forward(self, scope: Scope, send: Send, model: str, launch_id: str, body: bytes) -> None:
        """Raises EngineDied while the client can still be told by a status; later than that the stream is broken off."""
        url = "http://engine" + scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            url += "?" + scope["query_string"].decode("latin-1")
        session = self._session(launch_id)
        started = streaming = False
        try:
            async with session.post(
                URL(url, encoded=True), data=body, headers=_forwarded(scope["headers"]), allow_redirects=False, skip_auto_headers=NOT_ADDED
            ) as upstream:
                streaming = upstream.content_type == "text/event-stream"
                kept = [(k.lower(), v) for k, v in upstream.raw_headers if k.lower() not in DROPPED_RESPONSE]
                if streaming:
                    kept.append((b"x-accel-buffering", b"no"))
                await send({"type": "http.response.start", "status": upstream.status, "headers": kept})
                started = True
                async for chunk in upstream.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            died = EngineDied(f"The engine of {model!r} broke off the request: {type(error).__name__}.", retry_after_s=5)
            if not started:
                raise died from error
            if streaming:
                event = b"data: " + error_body.body(died) + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
            # Returning without the last body message makes the server cut the connection: never a silent short success.

    def _session(self, launch_id: str) -> aiohttp.ClientSession:
        session = self._sessions.get(launch_id)
        if session is None:
            connector = aiohttp.UnixConnector(self._socket_of(launch_id), limit=0, keepalive_timeout=KEEP_ALIVE_S)
            session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, timeout=NO_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar()
            )
            self._sessions[launch_id] = session
        return session

    async def forget_all_but(self, launch_ids: Collection[str]) -> None:
        """Close the connections to engines that are over."""
        for launch_id in self._sessions.keys() - launch_ids:
            await self._sessions.pop(launch_id).close()


def _forwarded(given: Iterable[tuple[bytes, bytes]]) -> "CIMultiDict[str]":
    """The client's headers, less those of this hop: also the ones that its Connection header names."""
    pairs = list(given)
    named = {name.strip().lower() for key, value in pairs if key == b"connection" for name in value.split(b",")}
    return CIMultiDict((k.decode("latin-1"), _text(v)) for k, v in pairs if k not in DROPPED_REQUEST and k not in named)


def _text(value: bytes) -> str:
    """aiohttp writes headers in UTF-8: what is UTF-8 goes on unchanged."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


async def _unless_client_leaves(work: Awaitable[None], receive: Receive) -> None:
    """Run `work` in this task and cancel it when the client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not left:
            raise
        task.uncancel()
    finally:
        watcher.cancel()


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None if the client left. Raises BodyTooLarge as soon as it is known to be."""
    declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
    too_large = BodyTooLarge(f"The request body is larger than {limit} bytes (requests.max_body).")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    chunks, size = [], 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def _peek(body: bytes) -> _Peek:
    """Raises BadRequest unless the body is a JSON object with a model in it."""
    try:
        peek = _decode(body)
    except msgspec.ValidationError as error:
        what = "`model` must be a string" if "$.model" in str(error) else "the request body must be a JSON object"
        raise BadRequest(f"Bad request: {what}.", param="model" if "model" in what else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.") from None
    if not peek.model or not isinstance(peek.model, str):
        raise BadRequest("The field `model` is missing: name one of GET /v1/models.", param="model", code="missing_required_parameter")
    return peek


def _ask(peek: _Peek, body_bytes: int) -> Ask:
    """Byte-level tokenizers never make more tokens than bytes; English text makes about a quarter. An answer without a bound may
    fill its model's context, whose length policy knows."""
    given = (bytes(raw) for raw in (peek.max_completion_tokens, peek.max_tokens, peek.max_output_tokens))
    bounds = [int(text) for text in given if text.isdigit() and len(text) <= COUNT_DIGITS]
    answer = min((bound for bound in bounds if bound > 0), default=None)
    most = body_bytes + (UNBOUNDED_TOKENS if answer is None else answer)
    return Ask(most, first=body_bytes, likely=body_bytes // 4 + min(answer or LIKELY_TOKENS, LIKELY_TOKENS))


async def _send_error(send: Send, error: OrchestratorError) -> None:
    body = error_body.body(error)
    headers = [(k.encode(), v.encode()) for k, v in error_body.headers(error).items()]
    headers.append((b"content-length", str(len(body)).encode()))
    with contextlib.suppress(OSError):  # the client may be gone
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
