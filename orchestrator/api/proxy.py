"""Requests for a model, on their way to its engine and back: one pure ASGI endpoint, the hot path.

The same bytes go on and raw bytes come back; what is read of them is in asking.py. The endpoint watches receive() itself, so a
client that leaves cancels its upstream request in every phase: queued, before the first byte, mid-stream. However a request
ends, its lease comes back.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterable

import aiohttp
from multidict import CIMultiDict
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from orchestrator.api import asking, error_body
from orchestrator.api.asking import OWN_HEADERS, Asking
from orchestrator.api.progress import Progress
from orchestrator.control.traffic import Traffic
from orchestrator.errors import BodyTooLarge, EngineDied, OrchestratorError

# Hop-by-hop (RFC 9110 7.6.1), or made anew on each hop; and a client's credentials, which are no engine's business.
DROPPED_REQUEST = OWN_HEADERS | frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host content-length expect"
    b" authorization x-api-key cookie".split()
)
DROPPED_RESPONSE = frozenset(b"connection keep-alive te trailer transfer-encoding upgrade server date".split())
# What aiohttp would add by itself: an engine is told what the client said, no more (an unasked Accept-Encoding may be obeyed).
NOT_ADDED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
# Engines close idle connections after 75 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); a pool must give up earlier, or POSTs fail.
KEEP_ALIVE_S = 60.0
NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)  # a generation may take hours


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
            wanted = asking.read(scope, body)
            model = self._resolve(wanted.model)
        except OrchestratorError as error:
            await _send_error(send, error)
            return
        await _unless_client_leaves(self._serve(scope, send, model, body, wanted), receive)

    async def _serve(self, scope: Scope, send: Send, model: str, body: bytes, wanted: Asking) -> None:
        progress = Progress(send, model)
        tell = progress.tell if wanted.progress else None
        try:
            async with self._traffic.lease(model, wanted.ask, wanted.asker, tell) as launch_id:
                await self._forward(scope, send, model, launch_id, body, progress)
        except OrchestratorError as error:
            if progress.begun:
                await progress.end(error)
            else:
                await _send_error(send, error)

    async def _forward(self, scope: Scope, send: Send, model: str, launch_id: str, body: bytes, progress: Progress) -> None:
        """Raises EngineDied while the client can still be told in order; later than that the stream is broken off."""
        url = "http://engine" + scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            url += "?" + scope["query_string"].decode("latin-1")
        headers = _forwarded(scope["headers"])
        if progress.begun:
            headers.popall("Accept-Encoding", None)  # the answer has begun, as plain text
        session = self._session(launch_id)
        started = streaming = False
        try:
            async with session.post(
                URL(url, encoded=True), data=body, headers=headers, allow_redirects=False, skip_auto_headers=NOT_ADDED
            ) as upstream:
                streaming = upstream.content_type == "text/event-stream"
                if progress.begun and not streaming:
                    await progress.end_with(await upstream.read(), upstream.status)
                    return
                if not progress.begun:
                    await send({"type": "http.response.start", "status": upstream.status, "headers": _returned(upstream, streaming)})
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


def _returned(upstream: aiohttp.ClientResponse, streaming: bool) -> list[tuple[bytes, bytes]]:
    kept = [(k.lower(), v) for k, v in upstream.raw_headers if k.lower() not in DROPPED_RESPONSE]
    return [*kept, (b"x-accel-buffering", b"no")] if streaming else kept


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


async def _send_error(send: Send, error: OrchestratorError) -> None:
    body = error_body.body(error)
    headers = [(k.encode(), v.encode()) for k, v in error_body.headers(error).items()]
    headers.append((b"content-length", str(len(body)).encode()))
    with contextlib.suppress(OSError):  # the client may be gone
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
