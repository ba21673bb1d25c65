"""What an answer says of the tokens it took, read as it passes: no body is parsed, and nothing of it is kept but its end.

Engines say it at the end: of a plain answer, and of a stream in its last events. To chat and text completions they say it in streams only
where they are asked to, so a metered stream is asked for in the client's name (`asked_for`), and what the client did not ask for is
kept from it (`part`).
"""

import re

from orchestrator.control.keys import Usage

KEPT_BYTES = 8192  # the end of an answer in which its usage is looked for; vLLM's is within the last 500
ASKS = frozenset({"/v1/chat/completions", "/v1/completions"})
# A quote inside a JSON string is escaped, so text that a model wrote does not match. OpenAI's names, and Anthropic's and Responses'.
PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})')
COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})')
ONLY_USAGE = (b'"choices":[]', b'"usage":{')  # the event that vLLM adds


def asked_for(body: bytes) -> bytes:
    """The body of a streaming request, with usage asked for. Of a field that comes twice the last one counts (Python's json)."""
    return body.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


class Meter:
    """`hides_usage`: the client did not ask for the event that only says what was used."""

    def __init__(self, hides_usage: bool) -> None:
        self._hides = hides_usage
        self._tail: list[bytes] = []
        self._size = 0

    def part(self, data: bytes) -> bytes:
        """What of it the client gets. Each event of an engine's stream is a part of its own."""
        self._tail.append(data)
        self._size += len(data)
        while self._size - len(self._tail[0]) >= KEPT_BYTES:
            self._size -= len(self._tail.pop(0))
        return b"" if self._hides and all(mark in data for mark in ONLY_USAGE) else data

    def usage(self) -> Usage | None:
        """None where it did not say."""
        tail = b"".join(self._tail)
        prompt, completion = (found.findall(tail) for found in (PROMPT, COMPLETION))
        if not prompt and not completion:
            return None
        return Usage(int(prompt[-1]) if prompt else 0, int(completion[-1]) if completion else 0)
