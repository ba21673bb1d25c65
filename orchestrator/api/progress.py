"""Comments to a client that waits and asked for them (X-Progress: sse): an event stream that its engine's stream goes on with.

It begins only when the request waits, so whoever need not wait, or is refused at the door, is answered as without it. Once it has
begun there is no status left to give: an error is an event, and the stream ends without [DONE].
"""

import math

import msgspec
from starlette.types import Send

from orchestrator.api import error_body
from orchestrator.control.traffic import Door
from orchestrator.errors import EngineDied, OrchestratorError

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Progress:
    """Of one request. `anthropic`: whose words it is told errors in."""

    def __init__(self, send: Send, model: str, anthropic: bool = False, request_id: bytes = b"") -> None:
        self._send, self._model = send, model
        self.anthropic, self.request_id = anthropic, request_id
        self.begun = False

    async def tell(self, door: Door) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._body(f": {_words(self._model, door)}\n\n".encode(), more=True)

    def event(self, error: OrchestratorError) -> bytes:
        return error_body.last_event(error, self.anthropic, self.request_id)

    async def end(self, error: OrchestratorError) -> None:
        await self._body(self.event(error), more=False)

    async def end_with(self, answer: bytes, status: int = 200) -> None:
        """What was to be the engine's whole answer becomes the only event. One that failed is an error object, whatever it was."""
        if status >= 400 and not _is_error(answer):
            await self.end(EngineDied(f"The engine of {self._model!r} answered with status {status}."))
            return
        await self._body(error_body.event(answer, self.anthropic and status >= 400), more=False)

    async def _body(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _is_error(answer: bytes) -> bool:
    try:
        return "error" in msgspec.json.decode(answer, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def _words(model: str, door: Door) -> str:
    """One line, whatever the phase is made of: a line of its own would be an event."""
    if door.launch_id is not None:
        return f"waiting for {model}: all its {door.max_concurrency} places are taken"
    known = (door.phase, f"about {math.ceil(door.retry_after_s)} s")
    return " ".join(f"waiting for {model}: {', '.join(filter(None, known))}".split())
