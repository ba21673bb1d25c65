"""The operators' routes to the daemon itself: reload its config files, restart it. What they do is handed in; here it is only told."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Query

from orchestrator.errors import ConfigError, SpecError


class DaemonApi:
    """`reload` and `check` raise ConfigError; `restart` is told whether the engines are kept, and returns at once."""

    def __init__(
        self, reload: Callable[[], Awaitable[dict[str, Any]]], check: Callable[[], Awaitable[None]], restart: Callable[[bool], None]
    ) -> None:
        self._reload, self._check, self._restart = reload, check, restart

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/reload", self.reload, methods=["POST"])
        router.add_api_route("/restart", self.restart, methods=["POST"], status_code=202)
        return router

    async def reload(self) -> dict[str, Any]:
        try:
            return await self._reload()
        except ConfigError as error:
            raise _refused(error) from None

    async def restart(self, keep_engines: bool = Query(False)) -> dict[str, Any]:
        """A daemon that its own files would not let start again goes on as it is."""
        try:
            await self._check()
        except ConfigError as error:
            raise _refused(error) from None
        self._restart(keep_engines)
        return {"keep_engines": keep_engines}


def _refused(error: ConfigError) -> SpecError:
    refused = SpecError(error.problems)
    refused.code, refused.param = "invalid_config", None
    return refused
