"""`POST /pull`: a model is loaded from the hub into the engines' cache, and how far it is comes line by line.

What can not begin is an error with a status, what breaks off later a last line with phase `failed`. Who leaves ends the download, unless
somebody else follows it; what is loaded is kept.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from orchestrator.api.admin import json_object, refuse_unknown
from orchestrator.control.registry import Registry
from orchestrator.errors import BadRequest, ModelNotFound, PullFailed
from orchestrator.policy.model import check_source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
REVISION = re.compile(r"[\w][\w./-]{0,127}")
SHAPE = 'A pull is a JSON object: {"source": HUB_ID or a model\'s NAME, "engine": "default", "revision": "main"}.'
Json = dict[str, Any]


class Pulls(Protocol):
    """`engines`: whose venvs can load."""

    @property
    def engines(self) -> frozenset[str]: ...

    def follow(self, engine: str, source: str, revision: str, env: Mapping[str, str]) -> AsyncIterator[Json]: ...


class PullApi:
    def __init__(self, pulls: Pulls, registry: Registry) -> None:
        self._pulls, self._registry = pulls, registry

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/pull", self.pull, methods=["POST"])
        return router

    async def pull(self, request: Request) -> StreamingResponse:
        given = await json_object(request, SHAPE)
        if not isinstance(given.get("source"), str) or any(not isinstance(value, str) for value in given.values()):
            raise BadRequest(SHAPE, param="source")
        refuse_unknown(given, {"source", "engine", "revision"}, SHAPE)
        lines = self._pulls.follow(*self._what(**given))
        first = await anext(lines)  # also closes it where who asked has left by then
        if first["phase"] == "failed":
            raise PullFailed(str(first["message"]), code=str(first["code"]))

        async def told() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(lines):  # type: ignore[type-var]
                yield msgspec.json.encode(first) + b"\n"
                async for line in lines:
                    yield msgspec.json.encode(line) + b"\n"

        return StreamingResponse(told(), media_type="application/x-ndjson")

    def _what(self, source: str, engine: str | None = None, revision: str | None = None) -> tuple[str, str, str, Mapping[str, str]]:
        """Engine, hub id, revision and environment. A registered model's own, but for what is given."""
        env: Mapping[str, str] = {}
        with contextlib.suppress(ModelNotFound):
            spec = self._registry.get(source).spec
            source, engine, env = spec.source, engine or spec.engine, spec.env
            revision = revision or spec.flag("--revision")
        engine, revision = engine or "default", revision or "main"
        try:
            check_source(source)
        except ValueError as error:
            raise BadRequest(str(error), param="source") from None
        if not HUB_ID.fullmatch(source):
            raise BadRequest(f"{source!r} is not a hub id, like Qwen/Qwen2.5-7B-Instruct: a folder needs no pull.", param="source")
        if not REVISION.fullmatch(revision):
            raise BadRequest(f"{revision!r} is not a revision: write a branch, a tag or a commit.", param="revision")
        if engine not in self._pulls.engines:
            raise BadRequest(f"There is no engine {engine!r}; known: {', '.join(sorted(self._pulls.engines))}", param="engine")
        return engine, source, revision, env
