"""/ui/live and /ui/history: what the page at /ui looks at. Reading only; what it does goes to /api/v1 and /v1 like anybody's requests.

Who may look is who may ask GET /v1/models: everybody until there are keys, then who has one, for its models; operators see all. `live`
is a JSON object a line, because EventSource can send no Authorization. Each line asks anew whether its viewer still may look.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator import __version__
from orchestrator.api import asking, browsers, error_body
from orchestrator.api.board import Allows, Board, Sight
from orchestrator.api.connection import CLIENT
from orchestrator.api.peers import bears
from orchestrator.api.projections import Json
from orchestrator.control.history import COARSE_FOR_S
from orchestrator.control.keys import Account, Keys
from orchestrator.errors import ModelUnavailable, OrchestratorError

LIVE_S = 1.0
MOST_VIEWERS = 32
STALLED_S = 60.0  # a viewer that takes no line for so long is gone
CHAT = ("/v1/chat/completions", "/v1/completions")  # what the chat box asks; over the admin socket it has no other way to them


class Viewer(NamedTuple):
    allows: Allows
    sees_all: bool
    operates: bool


ALL = Viewer(lambda name: True, True, True)


class Viewing:
    """`about`: what the page says of the daemon. `admin_key`: where the admin API is served over TCP."""

    def __init__(self, board: Board, keys: Keys, about: Callable[[], Json], admin_key: str | None) -> None:
        self._board, self._keys, self._about, self._admin_key = board, keys, about, admin_key
        self._viewers = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """The streams end: a daemon that stops waits for nobody's page."""
        self._closing.set()

    def users(self) -> APIRouter:
        """Over TCP."""
        return self._router(self._viewer)

    def operators(self) -> APIRouter:
        """Over the admin socket, which knows who connects."""
        return self._router(lambda request: ALL)

    def _router(self, viewer: Callable[[Request], Viewer]) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        async def live(request: Request) -> Response:
            viewer(request)
            if self._viewers >= MOST_VIEWERS or self._closing.is_set():
                busy = f"{MOST_VIEWERS} pages are open already: close one."
                raise ModelUnavailable(busy, code="busy", retry_after_s=5.0)
            return _Live(self._lines(lambda: viewer(request)), self._count)

        async def history(request: Request, span_s: float = Query(300.0, gt=0, le=COARSE_FOR_S)) -> Response:
            now, cards = time.time(), self._board.history.cards
            return _json({"at": now, "gpus": self._board.cards(viewer(request).allows, lambda uuid: cards[uuid].rows(span_s, now))})

        router.add_api_route("/ui/live", live, methods=["GET"])
        router.add_api_route("/ui/history", history, methods=["GET"])
        return router

    def _viewer(self, request: Request) -> Viewer:
        """Raises Unauthorized, Forbidden."""
        if self._admin_key is not None and bears(request, self._admin_key):
            return ALL
        browsers.refuse_foreign(request.headers, any_host=self._keys.needed or self._keys.required == "never")
        caller = asking.caller_of(self._keys, request.scope, dict(request.scope["headers"]))
        return Viewer(caller.allows, not isinstance(caller, Account) or caller.key.spec.models is None, False)

    async def _lines(self, viewer: Callable[[], Viewer]) -> AsyncIterator[bytes]:
        first = viewer()
        sight = Sight(self._board, first.allows, first.sees_all)
        hello = {**self._about(), "version": __version__, "operator": first.operates, "now": time.time()}
        while True:
            try:
                viewer()
                news = {**hello, **await sight.news(time.time())}
            except OrchestratorError as error:
                yield error_body.body(error, False, b"") + b"\n"
                return
            yield msgspec.json.encode(news) + b"\n"
            hello = {}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIVE_S):
                    await self._closing.wait()
                    return

    def _count(self, more: int) -> None:
        self._viewers += more


class _Live(StreamingResponse):
    """A place among the viewers, from its first line until its client leaves or takes no more."""

    def __init__(self, lines: AsyncIterator[bytes], count: Callable[[int], None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(STALLED_S):
                    await send(message)
            except TimeoutError:
                scope["extensions"][CLIENT].abort()

        self._count(1)
        try:
            await super().__call__(scope, receive, timely)
        finally:
            self._count(-1)


class _Passed(Response):
    """The answer of another app."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def chat(apps: Mapping[str, ASGIApp]) -> APIRouter:
    """The routes of the chat box, for the admin socket. `apps`: what answers, by path."""
    router = APIRouter(include_in_schema=False)

    def passed(path: str) -> Callable[[], Awaitable[Response]]:
        async def one() -> Response:
            return _Passed(apps[path])

        return one

    for path in CHAT:
        router.add_api_route(path, passed(path), methods=["POST"], response_model=None)
    return router


def _json(shown: Json) -> Response:
    return Response(msgspec.json.encode(shown), media_type="application/json", headers={"Cache-Control": "no-store"})
