"""What becomes of a request, noted on its way and told once, when it is known: to the counts, and to whoever else wants to know.

A request that goes directly (exchange.py) has none until its end, and only where somebody is told.
"""

from collections.abc import Callable, Sequence
from time import monotonic

from starlette.types import Scope

from orchestrator.api.ids import Ids
from orchestrator.control.counts import LEFT, Counts
from orchestrator.control.keys import Usage
from orchestrator.errors import OrchestratorError

FATE = "orchestrator.fate"  # the extension of a request's scope that holds its Fate; an operator's has none


class Fate:
    """Until something else is known, its client left. Times are time.monotonic's. `route`: method and path, of our own table; `ids`: as
    its engine is told; `who`: a key's name, or an address."""

    __slots__ = ("code", "ended_at", "first_at", "granted_at", "ids", "model", "route", "since", "status", "usage", "who")

    def __init__(self, route: str, ids: Ids) -> None:
        self.route, self.ids = route, ids
        self.since = self.ended_at = monotonic()
        self.model, self.who, self.status = "", "", LEFT
        self.granted_at: float | None = None  # the lease that it waited for
        self.first_at: float | None = None
        self.usage: Usage | None = None
        self.code: str | None = None

    def fail(self, error: OrchestratorError) -> None:
        self.status, self.code = error.status, error.code or error.type

    @property
    def total_s(self) -> float:
        return self.ended_at - self.since

    @property
    def wait_s(self) -> float:
        """For its turn, or its model; all of it where these never came."""
        return (self.ended_at if self.granted_at is None else self.granted_at) - self.since

    @property
    def first_s(self) -> float | None:
        """Until its stream's first event."""
        return None if self.first_at is None else self.first_at - self.since


class Fates:
    """`tells`: who hears of the end of each request, besides the counts. `spans`: of the traces that begin here, the share whose requests
    are spans of ours; None: no request is one, and engines get the clients' own."""

    def __init__(self, counts: Counts | None = None, tells: Sequence[Callable[[Fate], None]] = (), spans: float | None = None) -> None:
        self.count, self.tells, self.spans = (counts or Counts()).answered, tells, spans

    def begin(self, route: str, ids: Ids) -> Fate:
        return Fate(route, ids if self.spans is None else ids.spanned(self.spans))

    def end(self, fate: Fate) -> None:
        fate.ended_at = monotonic()
        self.count(fate.model, fate.status, fate.total_s, fate.first_s, fate.usage, fate.code)
        for tell in self.tells:
            tell(fate)


def failed(scope: Scope, error: OrchestratorError) -> None:
    if fate := scope["extensions"].get(FATE):
        fate.fail(error)
