"""What a request and its trace are called: the client's own names where they can be used, else made here."""

import random
import re
from typing import NamedTuple, cast

IDS = "orchestrator.ids"  # the extension of a request's scope that holds its Ids
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@~-]{1,200}")
TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, version 00


class Ids(NamedTuple):
    """Of one request. `traced`: the trace is the client's own. `parent`: the client's span, where `traceparent` is one of ours in it."""

    request_id: bytes
    traceparent: bytes
    traced: bool
    parent: bytes = b""

    def spanned(self, share: float) -> "Ids":
        """With a span of ours, the parent of its engine's. Who began the trace says whether it is recorded; of those that begin here,
        this share is."""
        if not self.traced:  # then its span is ours
            return self if random.random() < share else self._replace(traceparent=self.traceparent[:-2] + b"00")
        if not self.recorded:
            return self
        ours = b"%b-%016x-%b" % (self.traceparent[:35], random.getrandbits(64) or 1, self.traceparent[-2:])
        return self._replace(traceparent=ours, parent=self.traceparent)

    @property
    def recorded(self) -> bool:
        return int(self.traceparent[-2:], 16) & 1 == 1


def ids(request_id: bytes | None, traceparent: bytes | None) -> Ids:
    """What a client gave, where it can be used, else made here: a trace that begins here has the request's id."""
    number = random.getrandbits(192)
    made = b"%032x" % (number >> 64)
    known = request_id is not None and REQUEST_ID.fullmatch(request_id)
    traced = traceparent is not None and TRACEPARENT.fullmatch(traceparent) is not None
    trace = traceparent if traced else b"00-%b-%016x-01" % (made, number & 0xFFFFFFFFFFFFFFFF)
    return Ids(request_id if known else made, cast(bytes, trace), traced)  # type: ignore[arg-type]
