"""Requests for a model, on their way to its engine and back: one pure ASGI endpoint, the hot path.

The same bytes go on and raw bytes come back; what is read of them is in asking.py. A client that leaves cancels its upstream request
in every phase: queued, before the first byte, mid-stream. However a request ends, its lease comes back.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.types import Message, Receive, Scope, Send

from orchestrator.api import asking, error_body, usage
from orchestrator.api.asking import OWN_HEADERS, Asking
from orchestrator.api.progress import Progress
from orchestrator.api.server import CLIENT, Client
from orchestrator.api.upstream import Answer, Upstreams
from orchestrator.api.usage import Meter
from orchestrator.control.keys import Keys
from orchestrator.control.traffic import Traffic
from orchestrator.errors import BodyTooLarge, EngineDied, OrchestratorError

log = logging.getLogger("orchestrator.proxy")

# Hop-by-hop (RFC 9110 7.6.1), or made anew on each hop; and a client's credentials, which are no engine's business.
DROPPED = OWN_HEADERS | frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host content-length expect"
    b" authorization x-api-key cookie".split()
)
UNBUFFERED = (b"x-accel-buffering", b"no")  # nginx, before us, must not collect a stream


class Proxy:
    """`resolve`: name or alias -> model, raising ModelNotFound."""

    def __init__(self, traffic: Traffic, resolve: Callable[[str], str], upstreams: Upstreams, keys: Keys, max_body_bytes: int) -> None:
        self._traffic, self._resolve, self._upstreams, self._keys, self._max_body = traffic, resolve, upstreams, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = dict(scope["headers"])
            caller = self._keys.caller(headers, asking.address_of(scope, headers))
            body = await _read_body(headers, receive, self._max_body)
            if body is None:
                return  # the client left
            wanted = asking.read(scope["path"], headers, body, caller)
            model = self._resolve(wanted.model)
            caller.enter(model)
            meter: Meter | None = None
            try:
                if caller.metered:
                    unasked = wanted.silent_stream and scope["path"] in usage.ASKS
                    meter, body = Meter(hides_usage=unasked), usage.asked_for(body) if unasked else body
                await _unless_it_leaves(scope["extensions"][CLIENT], self._serve(scope, send, model, body, wanted, meter))
            finally:
                caller.leave(model, meter.usage() if meter else None)
        except OrchestratorError as error:
            await _send_error(send, error)
        except Exception:
            log.exception("a request could not be answered")
            # Raises where the answer had begun: then the server breaks it off.
            await _send_error(send, error_body.BUG)

    async def _serve(self, scope: Scope, send: Send, model: str, body: bytes, wanted: Asking, meter: Meter | None) -> None:
        progress = Progress(send, model)
        tell = progress.tell if wanted.progress else None
        try:
            async with self._traffic.lease(model, wanted.ask, wanted.asker, tell) as launch_id:
                await self._forward(scope, send, model, launch_id, body, progress, meter)
        except OrchestratorError as error:
            if not progress.begun:
                raise
            await progress.end(error)

    async def _forward(
        self, scope: Scope, send: Send, model: str, launch_id: str, body: bytes, progress: Progress, meter: Meter | None
    ) -> None:
        """Raises EngineDied while the client can still be told in order; later than that the stream is broken off."""
        # Where the answer has begun it has as plain text.
        dropped = DROPPED | {b"accept-encoding"} if progress.begun else DROPPED
        started = streaming = False
        client: Client = scope["extensions"][CLIENT]
        try:
            answer = await self._upstreams.of(launch_id).ask(_head(scope, len(body), dropped), body, meter)
            try:
                streaming = answer.content_type.startswith(b"text/event-stream")
                if progress.begun and not streaming:
                    await progress.end_with(await _all_of(answer), answer.status)
                    return
                if not progress.begun:
                    headers = [*(h for h in answer.headers if h[0] != b"content-length"), UNBUFFERED] if streaming else answer.headers
                    if answer.has_more_than_head and not streaming:
                        client.join_next_writes()
                    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                started = True
                if streaming:
                    await answer.relay(client)
                    await send({"type": "http.response.body", "body": b""})
                    return
                more = True
                while more:
                    chunk = await answer.read()
                    more = not answer.whole
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
            finally:
                answer.release()
        except OSError as error:
            died = EngineDied(f"The engine of {model!r} broke off the request: {error}.", retry_after_s=5)
            if not started:
                raise died from error
            if streaming:
                event = b"data: " + error_body.body(died) + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": True})
            # Returning without the last body message makes the server cut the connection: never a silent short success.


async def _all_of(answer: Answer) -> bytes:
    parts = []
    while part := await answer.read():
        parts.append(part)
    return b"".join(parts)


def _head(scope: Scope, length: int, dropped: frozenset[bytes]) -> bytes:
    """The client's request line and headers, less those of its hop: also the ones that its Connection header names."""
    parts: list[bytes] = [scope["method"].encode(), b" ", scope["raw_path"]]
    if scope["query_string"]:
        parts += b"?", scope["query_string"]
    parts.append(b" HTTP/1.1\r\nhost: engine\r\ncontent-length: %d\r\n" % length)
    given = scope["headers"]
    named = {name.strip().lower() for key, value in given if key == b"connection" for name in value.split(b",")}
    for key, value in given:
        if key not in dropped and key not in named:
            parts += key, b": ", value, b"\r\n"
    parts.append(b"\r\n")
    return b"".join(parts)


async def _unless_it_leaves(client: Client, work: Awaitable[None]) -> None:
    """Run `work` in this task, and cancel it when the client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    client.on_leaving = task.cancel
    try:
        await work
    except asyncio.CancelledError:
        if not client.has_left:
            raise
        task.uncancel()
    finally:
        client.on_leaving = None


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None if the client left. Raises BodyTooLarge as soon as it is known to be."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes (requests.max_body).")


async def _send_error(send: Send, error: OrchestratorError) -> None:
    body = error_body.body(error)
    headers = [(k.encode(), v.encode()) for k, v in error_body.headers(error).items()]
    headers.append((b"content-length", str(len(body)).encode()))
    with contextlib.suppress(OSError):  # the client may be gone
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
