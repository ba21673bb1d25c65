"""The operators' routes to the daemon itself: reload its files, restart it, look at its machine. What they do is handed in."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Query

from orchestrator.errors import ConfigError, SpecError, StartupError, StoreError


class DaemonApi:
    """`reload` and `check` raise ConfigError, `check` StartupError, too; `restart` is told whether the engines are kept, and returns at
    once; `examine` blocks."""

    def __init__(
        self,
        reload: Callable[[], Awaitable[dict[str, Any]]],
        check: Callable[[], Awaitable[None]],
        restart: Callable[[bool], None],
        examine: Callable[[], list[dict[str, str]]],
    ) -> None:
        self._reload, self._check, self._restart, self._examine = reload, check, restart, examine

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/reload", self.reload, methods=["POST"])
        router.add_api_route("/restart", self.restart, methods=["POST"], status_code=202)
        router.add_api_route("/doctor", self.doctor, methods=["GET"])
        return router

    async def doctor(self) -> dict[str, Any]:
        return {"findings": await asyncio.to_thread(self._examine)}

    async def reload(self) -> dict[str, Any]:
        try:
            return await self._reload()
        except ConfigError as error:
            raise _refused(error) from None

    async def restart(self, keep_engines: bool = Query(False)) -> dict[str, Any]:
        """A daemon that its own files or folders would not let start again goes on as it is."""
        try:
            await self._check()
        except ConfigError as error:
            raise _refused(error) from None
        except StartupError as error:
            raise StoreError(f"{error}; nothing was restarted") from None
        self._restart(keep_engines)
        return {"keep_engines": keep_engines}


def _refused(error: ConfigError) -> SpecError:
    refused = SpecError(error.problems)
    refused.code, refused.param = "invalid_config", None
    return refused
