"""Every error of our own, with what a client is told: HTTP status, OpenAI `type` and `code`, and when to come back.

    OrchestratorError
    ├── ConfigError             the daemon cannot start with what it was given (exit 78); carries all problems at once
    ├── StartupError            the daemon cannot run here: lock held, port in use, no permission (exit 1)
    ├── BadRequest              400
    ├── Unauthorized            401
    ├── Forbidden               403  the key may not use this model; this user may not use the admin socket
    ├── ModelNotFound           404  model_not_found
    ├── KeyNotFound             404  key_not_found
    ├── RouteNotFound           404  route_not_found
    ├── Conflict                409
    ├── BodyTooLarge            413
    ├── SpecError               422  a model's spec is wrong; carries all problems at once
    ├── QueueFull               429
    ├── RateLimited             429  a key's own limits; with when to come back
    │   └── QuotaSpent          429  its tokens of this month are spent
    ├── EngineDied              502
    ├── PullFailed              502  a model could not be loaded from the hub; the code says why
    ├── StoreError              503  the state file can not be written now; nothing was changed
    ├── ModelUnavailable        503  with Retry-After where waiting helps
    ├── NotInTime               503  the model will not be ready before the client gives up; told at once, with when to come back
    └── WaitTimeout             503  it was not ready while the client waited; with when to come back

Only the class decides the status; api/error_body.py formats, nothing else chooses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` names the field (and `file:line:column` if there is one), `what` says what and the mend."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class OrchestratorError(Exception):
    status: int = 500
    type: str = "server_error"
    code: str | None = None
    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.problems = tuple(problems)
        if code is not None:
            self.code = code


class ConfigError(OrchestratorError):
    """The configuration is wrong. `problems` holds every fault found, so that one edit can mend them all."""

    exit_code = 78

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems), problems=problems)


class StartupError(OrchestratorError):
    """This machine will not let the daemon run: another one holds the directory, the port is taken, a folder is not writable."""


class BadRequest(OrchestratorError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(OrchestratorError):
    status = 401
    type = "authentication_error"  # LiteLLM takes an invalid_request_error for a 400, whatever its status
    code = "invalid_api_key"


class Forbidden(OrchestratorError):
    status = 403
    type = "permission_error"
    code = "not_permitted"


MOST_NAMES = 20


def listed(names: Iterable[str], none: str) -> str:
    """Names as a message tells them: not a page of them where there are many."""
    there = sorted(names)
    more = f" and {len(there) - MOST_NAMES} more" if len(there) > MOST_NAMES else ""
    return ", ".join(there[:MOST_NAMES]) + more or none


class ModelNotFound(OrchestratorError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class KeyNotFound(OrchestratorError):
    status = 404
    type = "invalid_request_error"
    code = "key_not_found"


class RouteNotFound(OrchestratorError):
    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class Conflict(OrchestratorError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(OrchestratorError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class SpecError(OrchestratorError):
    """A model's spec is wrong; nothing of it was kept."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_spec"
    exit_code = 78

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0].where if problems else None
        super().__init__("; ".join(str(p) for p in problems), param=first, problems=problems)


class QueueFull(OrchestratorError):
    status = 429
    type = "requests"
    code = "queue_full"


class RateLimited(OrchestratorError):
    """A key is over one of its limits. Nothing was counted, and `retry_after_s` is when it would be let in."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class QuotaSpent(RateLimited):
    type = "insufficient_quota"
    code = "insufficient_quota"


class EngineDied(OrchestratorError):
    status = 502
    code = "engine_error"

    @classmethod
    def broke_off(cls, model: str, why: object) -> "EngineDied":
        return cls(f"The engine of {model!r} broke off the request: {why}.", retry_after_s=5)


class PullFailed(OrchestratorError):
    """A model was not loaded from the hub. What is loaded of it is kept."""

    status = 502
    code = "pull_failed"


class StoreError(OrchestratorError):
    """The state file can not be read or written now: nothing of the change was kept."""

    status = 503
    code = "state_not_writable"


class ModelUnavailable(OrchestratorError):
    status = 503
    code = "model_unavailable"


class NotInTime(OrchestratorError):
    """Waiting would end before the model is ready. The request is refused at once, and its model is started all the same."""

    status = 503
    code = "not_ready_in_time"


class WaitTimeout(OrchestratorError):
    """It has waited to the end. No 504: nothing upstream was asked, and who comes back in Retry-After is served."""

    status = 503
    code = "timeout"
