"""What happened, with reasons: the last of it, and from there on line by line as it comes.

Each event has an id that grows, over restarts of the daemon too: who follows and was cut off asks for what came `after` the last one that
it saw, and has lost nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec
from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from orchestrator.api import projections
from orchestrator.api.projections import Json
from orchestrator.errors import BadRequest
from orchestrator.policy.stored import Event
from orchestrator.policy.units import parse_duration

MOST = 10_000
ALIVE_S = 15.0  # a blank line where nothing happens: who is gone is noticed, and who waits knows that we are here


class Events(Protocol):
    """`told` is set when there is a new one; another stands in its place then."""

    told: asyncio.Event

    async def events(
        self, model: str | None, limit: int, kind: str | None = None, since: float = 0.0, after: int = 0
    ) -> Sequence[Event]: ...


class EventsApi:
    def __init__(self, events: Events, alive_s: float = ALIVE_S) -> None:
        self._events, self._alive_s = events, alive_s
        self._closed = False

    def close(self) -> None:
        """The daemon ends: streams say what there is left to say, and end too."""
        self._closed = True
        self._events.told.set()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/api/v1")
        router.add_api_route("/events", self.events, methods=["GET"], response_model=None)
        return router

    async def events(
        self,
        tail: int = Query(100, ge=0, le=MOST),
        model: str | None = None,
        kind: str | None = None,
        since: str | None = None,
        after: int | None = Query(None, ge=0),
        follow: bool = False,
    ) -> Json | StreamingResponse:
        """`since`: a duration, counted back from now. `after`: an id; all that came later, however many. `newest` in the answer: the id to
        follow after, whatever was asked for."""
        begin, noted = begin_of(since), self._events.told  # before the look: what comes after it is not missed
        newest = max((event.id for event in await self._events.events(None, 1)), default=0)
        if after is None:
            found = await self._events.events(model, tail, kind, begin) if tail else []
        else:  # above the newest: a daemon died with events that its disk did not take, and their ids were given again
            found = await self._events.events(model, MOST, kind, begin, min(after, newest))
        if not follow:
            return {"events": [_shown(event) for event in found], "newest": newest}
        last = max([newest, *(event.id for event in found)])
        return StreamingResponse(self._follow(found, noted, last, model, kind), media_type="application/x-ndjson")

    async def _follow(
        self, found: Sequence[Event], noted: asyncio.Event, last: int, model: str | None, kind: str | None
    ) -> AsyncIterator[bytes]:
        while found or not self._closed:
            yield b"".join(msgspec.json.encode(_shown(event)) + b"\n" for event in found) or b"\n"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._alive_s):
                    await noted.wait()
            noted = self._events.told
            found = await self._events.events(model, MOST, kind, after=last)
            last = max([last, *(event.id for event in found)])


def begin_of(since: str | None) -> float:
    """The moment (epoch) that lies so long back; 0 where none is given. Raises BadRequest."""
    try:
        return time.time() - parse_duration(since) if since is not None else 0.0
    except ValueError as error:
        raise BadRequest(f"since: {error}", param="since") from None


def _shown(event: Event) -> Json:
    return {"id": event.id, **projections.event(event), "model": event.model}
