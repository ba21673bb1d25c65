"""What becomes of a request that goes the way of ASGI, noted on its way for the counts: see Counts.answered."""

from time import monotonic

from starlette.types import Scope

from orchestrator.control.counts import LEFT
from orchestrator.control.keys import Usage
from orchestrator.errors import OrchestratorError

FATE = "orchestrator.fate"  # the extension of a request's scope that holds its Fate; an operator's has none


class Fate:
    """Until something else is known, its client left. Times are time.monotonic's."""

    __slots__ = ("code", "first_at", "granted_at", "model", "since", "status", "usage", "who")

    def __init__(self) -> None:
        self.since, self.model, self.status = monotonic(), "", LEFT
        self.who = ""
        self.granted_at: float | None = None  # the lease that it waited for
        self.first_at: float | None = None
        self.usage: Usage | None = None
        self.code: str | None = None

    def fail(self, error: OrchestratorError) -> None:
        self.status, self.code = error.status, error.code or error.type


def failed(scope: Scope, error: OrchestratorError) -> None:
    if fate := scope["extensions"].get(FATE):
        fate.fail(error)
