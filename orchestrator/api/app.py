"""The two applications: users' over TCP, operators' over the admin socket, and over TCP only with a key. Routes and error handlers only.

No BaseHTTPMiddleware anywhere: one of them costs as much as the whole proxy and hides a client's leaving.
"""

from collections.abc import Mapping

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Route as Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator import __version__
from orchestrator.api import browsers, error_body, openapi, routes
from orchestrator.api.ids import IDS, ids
from orchestrator.api.peers import Peers, bears
from orchestrator.api.routes import Model, Route
from orchestrator.api.talk import Talk
from orchestrator.errors import BadRequest, OrchestratorError, RouteNotFound, Unauthorized


class UsersApp:
    """POSTs to `forwarded` paths go straight to what answers there, past the framework and its layers, which cost more than the proxy."""

    def __init__(
        self, routers: list[APIRouter], forwarded: Mapping[Route, ASGIApp], admin: APIRouter | None, admin_key: str | None
    ) -> None:
        self._posts = {route.path: app for route, app in forwarded.items() if route.model in (Model.BODY, Model.FORM)}
        self._talks = {route.path: app for route, app in forwarded.items() if route.model is Model.TALK}
        self._rest = _app("orchestrator", "/openapi.json")
        document = openapi.document(forwarded)
        self._rest.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI knows nothing of what is forwarded
        for route, app in forwarded.items():  # so that other methods are answered as on any route
            if route.model is Model.TALK:
                continue
            added = Starlette(route.path, app, methods=[route.method])
            added.app, added.methods = app, {route.method}  # as it is; no HEAD: an engine has none
            self._rest.router.routes.append(added)
        for router in routers:
            self._rest.include_router(router)
        if admin is not None and admin_key is not None:
            self._rest.include_router(admin, dependencies=[Depends(_key_check(admin_key))])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = None
        if scope["type"] == "http":
            if scope["method"] == "POST":
                app = self._posts.get(scope["path"])
        elif scope["type"] == "websocket":
            app = None if routes.is_escaped(scope["raw_path"]) else self._talks.get(scope["path"])
            app = app or _no_talk
        await (app or self._rest)(scope, receive, send)


def operators(*routers: APIRouter) -> APIRouter:
    """All that is theirs."""
    joined = APIRouter()
    for router in routers:
        joined.include_router(router)
    return joined


def operators_app(admin: APIRouter, peers: Peers, *public: APIRouter) -> FastAPI:
    """`public`: for whoever may connect."""
    app = _app("orchestrator admin")
    for router in public:
        app.include_router(router)
    app.include_router(admin, dependencies=[Depends(peers.check), Depends(browsers.check)])
    return app


def _app(title: str, openapi_url: str | None = None) -> FastAPI:
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None, openapi_url=openapi_url, redirect_slashes=False)
    app.add_exception_handler(OrchestratorError, _ours)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(Exception, _bug)
    return app


def _key_check(key: str):  # type: ignore[no-untyped-def]
    async def check(request: Request) -> None:
        if not bears(request, key):
            raise Unauthorized("The admin API over TCP needs `Authorization: Bearer <admin.key>`.")

    return check


async def _no_talk(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    headers = dict(scope["headers"])
    talk = Talk(receive, send, ids(headers.get(b"x-request-id"), None), None)
    await talk.refuse(routes.missing("WebSocket", scope["path"]))


def _respond(request: Request, error: OrchestratorError, headers: Mapping[str, str] | None = None) -> Response:
    request_id = request.scope["extensions"][IDS].request_id
    body = error_body.body(error, routes.is_anthropic(request.url.path), request_id)
    return Response(body, error.status, {**error_body.headers(error), **(headers or {})})


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestratorError)
    return _respond(request, error)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = routes.missing(request.method, request.url.path)
    if error.status_code == 405:
        missing = RouteNotFound(f"{request.url.path} does not answer {request.method}.", code="method_not_allowed")
        missing.status = 405
    return _respond(request, missing, error.headers)  # a 405 has Allow


async def _bad_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _respond(request, BadRequest(f"{first['loc'][-1]}: {first['msg']}", param=str(first["loc"][-1])))


async def _bug(request: Request, error: Exception) -> Response:
    """The server logs its traceback."""
    return _respond(request, error_body.BUG)
