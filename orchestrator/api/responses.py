"""Which engine made a response of the Responses API: it is asked for by its id alone, and only that engine has it.

An id is read from the answer as it passes. Engines keep responses only with VLLM_ENABLE_RESPONSES_API_STORE=1, and none outlives its
engine. One that is made in the background has no request that lasts as long as its work does, so its engine is asked until it is done.
"""

import asyncio
import re
from collections import OrderedDict
from typing import NamedTuple

import msgspec

from orchestrator.api.upstream import Upstream
from orchestrator.api.usage import Watch
from orchestrator.errors import RouteNotFound

MOST = 10_000  # that are remembered, the last ones; 2 MiB
ID = re.compile(rb'"id"\s*:\s*"([A-Za-z0-9_-]{1,200})"')  # of a response; the first in its object, and in its stream
ID_WITHIN = 4096
POLL_S = 1.0
AT_WORK = ("queued", "in_progress")


class Made(NamedTuple):
    """`owner`: whose key asked for it; "" where there are no keys."""

    model: str
    launch_id: str
    owner: str = ""


class Responses:
    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._made: OrderedDict[str, Made] = OrderedDict()

    def remember(self, response_id: str, made: Made) -> None:
        self._made[response_id] = made
        self._made.move_to_end(response_id)
        if len(self._made) > self._most:
            self._made.popitem(last=False)

    def of(self, response_id: str, owner: str) -> Made:
        """Raises RouteNotFound, also where it is another's."""
        made = self._made.get(response_id)
        if made is None or made.owner != owner:
            raise unknown(response_id)
        return made

    def forget(self, response_id: str) -> None:
        self._made.pop(response_id, None)


class Naming:
    """Watches an answer for the id in it; `then` sees each part too."""

    def __init__(self, responses: Responses, made: Made, then: Watch | None) -> None:
        self._responses, self._made, self._then = responses, made, then
        self._begin: bytes | None = b""
        self.id = ""

    def part(self, data: bytes) -> bytes:
        if self._begin is not None:
            self._begin += data[:ID_WITHIN]
            if found := ID.search(self._begin):
                self.id = found[1].decode()
                self._responses.remember(self.id, self._made)
            if found or len(self._begin) >= ID_WITHIN:
                self._begin = None
        return self._then.part(data) if self._then is not None else data


async def until_done(engine: Upstream, response_id: str) -> None:
    """Until its engine is done with it, or does not know it any more."""
    head = f"GET /v1/responses/{response_id} HTTP/1.1\r\nhost: engine\r\n\r\n".encode()
    while True:
        await asyncio.sleep(POLL_S)
        try:
            answer = await engine.ask(head, b"")
            try:
                body = b"".join([part async for part in answer.parts()])
            finally:
                answer.release()
            if answer.status != 200 or msgspec.json.decode(body, type=_Status).status not in AT_WORK:
                return
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return


def unknown(response_id: str) -> RouteNotFound:
    return RouteNotFound(
        f"There is no response {response_id!r} here: its engine keeps it no longer, or never did (VLLM_ENABLE_RESPONSES_API_STORE=1).",
        param="response_id",
        code="response_not_found",
    )


class _Status(msgspec.Struct):
    status: str = ""
