"""Requests for a model, on their way to its engine and back: directly (exchange.py) where they need not wait, by ASGI otherwise.

The same bytes go on and raw bytes come back; what is read of them is in asking.py. A client that leaves cancels its upstream request
in every phase: queued, before the first byte, mid-stream. However a request ends, its lease comes back.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import cast

from starlette.types import Receive, Scope, Send

from orchestrator.api import asking, error_body, responses, routes, usage
from orchestrator.api.asking import OWN_HEADERS, Asking
from orchestrator.api.bodies import Bodies, Hold
from orchestrator.api.connection import CLIENT, Client, Connection
from orchestrator.api.exchange import UNBUFFERED, Exchange
from orchestrator.api.fate import FATE, Fate, Fates, failed
from orchestrator.api.ids import IDS, Ids
from orchestrator.api.progress import Progress
from orchestrator.api.responses import Made, Naming, Responses
from orchestrator.api.routes import DIRECT, RESPONSES, Route
from orchestrator.api.upstream import Upstreams
from orchestrator.api.usage import Meter, Watch
from orchestrator.control.keys import Caller, Keys
from orchestrator.control.traffic import Traffic
from orchestrator.errors import EngineDied, ModelUnavailable, OrchestratorError

log = logging.getLogger("orchestrator.proxy")

# Hop-by-hop (RFC 9110 7.6.1), or made anew on each hop; and a client's credentials, which are no engine's business.
DROPPED = OWN_HEADERS | frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade host content-length expect"
    b" x-request-id traceparent authorization x-api-key api-key cookie sec-websocket-protocol".split()
)


class Proxy:
    """`resolve`: name or alias -> model, raising ModelNotFound."""

    def __init__(
        self,
        traffic: Traffic,
        resolve: Callable[[str], str],
        upstreams: Upstreams,
        keys: Keys,
        bodies: Bodies,
        fates: Fates | None = None,
    ) -> None:
        self._traffic, self._resolve, self._upstreams, self._keys, self._bodies = traffic, resolve, upstreams, keys, bodies
        self._responses = Responses()
        self._fates = fates or Fates()
        self._count, self._tells, self._spans = self._fates.count, self._fates.tells, self._fates.spans
        self._asks = bool(self._tells)  # who is told hears of tokens, too

    async def __call__(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        with self._bodies.hold(receive) as hold:
            await self._told(f"{route.method} {route.path}", scope, send, self._any(route, scope, hold, send))

    async def by_id(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To the engine that made that response, also while it sleeps; it needs no lease, and wakes nobody."""
        route = "POST /v1/responses/{id}/cancel" if scope["method"] == "POST" else "GET /v1/responses/{id}"
        with self._bodies.hold(receive) as hold:
            await self._told(route, scope, send, self._by_id(scope, hold, send))

    async def _told(self, route: str, scope: Scope, send: Send, work: Awaitable[None]) -> None:
        fate = scope["extensions"][FATE] = self._fates.begin(route, scope["extensions"][IDS])
        try:
            await _or_error(scope, send, work)
        finally:
            self._fates.end(fate)

    async def straight(self, scope: Scope, receive: Receive, send: Send, path: str, model: str, launch_id: str) -> None:
        """To one engine, whatever it is doing: without a lease, and without a word on who asks."""
        with self._bodies.hold(receive) as hold:
            await _or_error(scope, send, self._straight(scope, hold, send, path, model, launch_id))

    def direct(self, connection: Connection, body: bytes) -> Exchange | None:
        """The request as one that need not wait, if it need not; the same as __call__ otherwise. None: nothing was done or counted."""
        if len(body) > self._bodies.small_bytes:  # it counts
            return None
        try:
            route, headers = DIRECT[connection.url], dict(connection.headers)
            caller = asking.caller_of(self._keys, cast(Scope, connection.scope), headers)
            wanted = asking.read(route, headers, body, caller)
            model = caller.resolve(self._resolve, wanted.model)
            if wanted.progress or not self._traffic.takes(model, wanted.ask):
                return None
            caller.enter(model)
        except OrchestratorError:  # the way of ASGI says it
            return None
        except Exception:
            log.exception("a request could not be read")
            return None
        launch_id, since, give_back = self._traffic.take(model, wanted.ask)
        meter, asked = _metered(wanted, body, caller.metered or self._asks)
        made = connection.ids()
        ours = made if self._spans is None else made.spanned(self._spans)
        head = _head(b"POST", b"", connection.headers, ours, route.path, len(asked), DROPPED)

        def ended(status: int, first_at: float | None, code: str | None) -> None:
            now, usage = give_back(), meter.usage() if meter else None
            caller.leave(model, usage)
            self._count(model, status, now - since, first_at and first_at - since, usage, code)
            if self._tells:
                fate = Fate(f"POST {route.path}", ours)
                fate.since, fate.granted_at, fate.first_at, fate.ended_at = since, since, first_at, now
                fate.who, fate.model, fate.status, fate.usage, fate.code = caller.client, model, status, usage, code
                for tell in self._tells:
                    tell(fate)

        return Exchange(connection, self._upstreams.of(launch_id), model, route, (head, asked), made, meter, ended)

    async def _any(self, route: Route, scope: Scope, hold: Hold, send: Send) -> None:
        if routes.is_escaped(scope["raw_path"]):
            raise routes.missing(scope["method"], scope["path"])
        headers = dict(scope["headers"])
        caller = asking.caller_of(self._keys, scope, headers)
        body = await hold.read(headers)
        if body is None:
            return  # the client left
        fate: Fate = scope["extensions"][FATE]
        fate.since, fate.who = monotonic(), caller.client
        wanted = asking.read(route, headers, body, caller)
        if wanted.previous:
            model = self._responses.of(wanted.previous, _owner(caller)).model
        else:
            model = caller.resolve(self._resolve, wanted.model)
        fate.model = model
        caller.enter(model)
        meter: Meter | None = None
        try:
            meter, body = _metered(wanted, body, caller.metered or self._asks)
            await _unless_it_leaves(scope["extensions"][CLIENT], self._serve(scope, send, model, body, wanted, caller, meter))
        finally:
            fate.usage = meter.usage() if meter else None
            caller.leave(model, fate.usage)

    async def _by_id(self, scope: Scope, hold: Hold, send: Send) -> None:
        found = routes.by_id(scope["method"], scope["path"])
        if found is None or routes.is_escaped(scope["raw_path"]):
            raise routes.missing(scope["method"], scope["path"])
        path, response_id = found
        headers = dict(scope["headers"])
        caller = asking.caller_of(self._keys, scope, headers)
        body = await hold.read(headers)
        if body is None:
            return
        made = self._responses.of(response_id, _owner(caller))
        fate: Fate = scope["extensions"][FATE]
        fate.model, fate.who, fate.granted_at = made.model, caller.client, monotonic()
        caller.enter(made.model)
        try:
            forward = self._forward(scope, send, path, made.model, made.launch_id, body, Progress(send, made.model), None)
            await _unless_it_leaves(scope["extensions"][CLIENT], forward)
        except EngineDied as died:
            if not isinstance(died.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise
            self._responses.forget(response_id)  # with its engine it is gone
            raise responses.unknown(response_id) from None
        finally:
            caller.leave(made.model, None)

    async def _straight(self, scope: Scope, hold: Hold, send: Send, path: str, model: str, launch_id: str) -> None:
        body = await hold.read(dict(scope["headers"]))
        if body is not None:
            forward = self._forward(scope, send, path, model, launch_id, body, Progress(send, model), None)
            await _unless_it_leaves(scope["extensions"][CLIENT], forward)

    async def _serve(self, scope: Scope, send: Send, model: str, body: bytes, wanted: Asking, caller: Caller, meter: Meter | None) -> None:
        route = wanted.route
        progress = Progress(send, model, route.is_anthropic, scope["extensions"][IDS].request_id)
        tell = progress.tell if wanted.progress else None
        try:
            async with self._traffic.lease(model, wanted.ask, wanted.asker, tell) as launch_id:
                scope["extensions"][FATE].granted_at = monotonic()
                if route is not RESPONSES:
                    await self._forward(scope, send, route.path, model, launch_id, body, progress, meter)
                    return
                made = Made(model, launch_id, _owner(caller))
                if wanted.previous and self._responses.of(wanted.previous, made.owner) != made:
                    raise responses.unknown(wanted.previous)
                naming = Naming(self._responses, made, meter)
                await self._forward(scope, send, route.path, model, launch_id, body, progress, naming)
                if wanted.background and naming.id:
                    scope["extensions"][CLIENT].on_leaving = None  # it has its answer
                    await responses.until_done(self._upstreams.of(launch_id), naming.id)
        except OrchestratorError as error:
            if not progress.begun:
                raise
            scope["extensions"][FATE].fail(error)
            await progress.end(error)

    async def _forward(
        self, scope: Scope, send: Send, path: str, model: str, launch_id: str, body: bytes, progress: Progress, watch: Watch | None
    ) -> None:
        """Raises EngineDied while the client can still be told in order; later than that the stream is broken off."""
        # Where the answer has begun it has as plain text.
        dropped = DROPPED | {b"accept-encoding"} if progress.begun else DROPPED
        started = streaming = False
        client: Client = scope["extensions"][CLIENT]
        fate: Fate = scope["extensions"].get(FATE) or Fate("", scope["extensions"][IDS])  # an operator's is told to nobody
        try:
            method = scope["method"].encode()
            head = _head(method, scope["query_string"], scope["headers"], fate.ids, path, len(body), dropped)
            answer = await self._upstreams.of(launch_id).ask(head, body, watch)
            try:
                streaming = answer.content_type.startswith(b"text/event-stream")
                if progress.begun and not streaming:
                    await progress.end_with(b"".join([part async for part in answer.parts()]), answer.status)
                    fate.status = answer.status
                    return
                if not progress.begun:
                    headers = [*(h for h in answer.headers if h[0] != b"content-length"), UNBUFFERED] if streaming else answer.headers
                    if answer.has_more_than_head and not streaming:
                        client.join_next_writes()
                    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                started = True
                if streaming:
                    if first := await answer.read():
                        fate.first_at = monotonic()
                        await send({"type": "http.response.body", "body": first, "more_body": True})
                    await answer.relay(client)
                    await send({"type": "http.response.body", "body": b""})
                    fate.status = answer.status
                    return
                more = True
                while more:
                    chunk = await answer.read()
                    more = not answer.whole
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
                fate.status = answer.status
            finally:
                answer.release()
        except OSError as error:
            died = EngineDied.broke_off(model, error)
            if not started:
                raise died from error
            fate.fail(died)
            if streaming:
                await send({"type": "http.response.body", "body": progress.event(died), "more_body": True})
            # Returning without the last body message makes the server cut the connection: never a silent short success.


async def _or_error(scope: Scope, send: Send, work: Awaitable[None]) -> None:
    try:
        await work
    except OrchestratorError as error:
        failed(scope, error)
        await _send_error(scope, send, error)
    except asyncio.CancelledError:  # the server stops and waits no longer: nor does who waits for a model
        stopping = ModelUnavailable("The daemon is shutting down.", code="shutting_down", retry_after_s=5)
        failed(scope, stopping)
        with contextlib.suppress(RuntimeError):  # the answer had begun: it is cut
            await _send_error(scope, send, stopping)
    except Exception:
        log.exception("a request could not be answered")
        failed(scope, error_body.BUG)
        await _send_error(scope, send, error_body.BUG)  # raises where the answer had begun: then the server breaks it off


def _owner(caller: Caller) -> str:
    return caller.client if caller.metered else ""


def _metered(wanted: Asking, body: bytes, asks: bool) -> tuple[Meter | None, bytes]:
    """What counts its tokens, and the body with which the engine tells them. None where it does not, unless it is asked to (`asks`)."""
    if wanted.streams and wanted.route.counts and not wanted.wants_usage:
        return (Meter(True, True), usage.asked_for(body)) if asks else (None, body)
    return Meter(False, wanted.streams), body


def _head(
    method: bytes, query: bytes, given: Sequence[tuple[bytes, bytes]], ids: Ids, path: str, length: int, dropped: frozenset[bytes]
) -> bytes:
    """The table's path, and the client's headers less those of its hop: also the ones that its Connection header names."""
    parts: list[bytes] = [method, b" ", path.encode()]
    if query:
        parts += b"?", query
    parts.append(
        b" HTTP/1.1\r\nhost: engine\r\ncontent-length: %d\r\nx-request-id: %b\r\ntraceparent: %b\r\n"
        % (length, ids.request_id, ids.traceparent)
    )
    named = {name.strip().lower() for key, value in given if key == b"connection" for name in value.split(b",")}
    if not ids.traced:
        named.add(b"tracestate")
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
        if client.on_leaving == task.cancel:  # else it is the next request's already
            client.on_leaving = None


async def _send_error(scope: Scope, send: Send, error: OrchestratorError) -> None:
    anthropic, request_id = routes.is_anthropic(scope["path"]), scope["extensions"][IDS].request_id
    body = error_body.body(error, anthropic, request_id)
    headers = [(k.encode(), v.encode()) for k, v in error_body.headers(error).items()]
    headers.append((b"content-length", str(len(body)).encode()))
    with contextlib.suppress(OSError):  # the client may be gone
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
