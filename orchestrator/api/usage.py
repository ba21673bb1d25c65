"""What an answer says of the tokens it took, read as it passes: no body is parsed, and nothing of it is kept but its end.

Engines say it at the end: of a plain answer, and of a stream in its last events. To chat and text completions they say it in streams only
where they are asked to, so a metered stream is asked for in the client's name (`asked_for`), and what the client did not ask for is
kept from it (`part`).
"""

import re
from typing import Protocol

from orchestrator.control.keys import Usage

KEPT_BYTES = 8192  # the end of an answer in which its usage is looked for; vLLM's is within the last 500
# A quote inside a JSON string is escaped, so text that a model wrote does not match. OpenAI's names, and Anthropic's and Responses'.
PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
EVENT = (b"data:", b"event:")  # how a part of a stream begins
NO_CHOICE, USED = b'"choices":[]', b'"usage":{'  # both are in the event that vLLM adds, and in no other


class Watch(Protocol):
    def part(self, data: bytes) -> bytes:
        """Sees each part of an answer's body; what it gives goes on."""


def asked_for(body: bytes) -> bytes:
    """The body of a streaming request, with usage asked for. Of a field that comes twice the last one counts (Python's json)."""
    return body.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


class Meter:
    """`hides_usage`: the client did not ask for the event that only says what was used. `streams`: each part of it is an event."""

    __slots__ = ("_hides", "_parts", "_size", "_streams", "_tail")

    def __init__(self, hides_usage: bool, streams: bool = False) -> None:
        self._hides, self._streams = hides_usage, streams
        self._tail: list[bytes] = []
        self._size = self._parts = 0

    def part(self, data: bytes) -> bytes:
        """What of it the client gets. Each event of an engine's stream is a part of its own."""
        self._parts += 1
        self._tail.append(data)
        self._size += len(data)
        if self._size > 2 * KEPT_BYTES:
            self._drop()
        return b"" if self._hides and USED in data and NO_CHOICE in data else data

    def _drop(self) -> None:
        """Parts before the last KEPT_BYTES; not one at each part, which would cost more than all the rest."""
        first = 0
        while self._size - len(self._tail[first]) >= KEPT_BYTES:
            self._size -= len(self._tail[first])
            first += 1
        del self._tail[:first]

    def usage(self) -> Usage | None:
        """None where it did not say. Of a stream that was cut before it could: its events, each a token or more."""
        tail = b"".join(self._tail)
        at = tail.rfind(b'"usage"')  # the regexes cost ten times this search
        if at < 0:
            return Usage(0, self._parts) if self._streams and tail.startswith(EVENT) else None  # an error that came instead has none
        prompt = PROMPT.search(tail, at) or PROMPT.search(tail)  # Anthropic's may stand in the first event
        completion = COMPLETION.search(tail, at)
        if prompt is None and completion is None:
            return None
        return Usage(int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0)
