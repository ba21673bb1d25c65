"""An error of ours -> status, headers and an error object, OpenAI's or Anthropic's. Formats only: the class decided what it means."""

import json
import math

from orchestrator.errors import OrchestratorError

# A fault of ours.
BUG = OrchestratorError("The daemon failed to answer this; its log has the traceback.", code="internal_error")
# By status, in Anthropic's words; all others are an api_error.
ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def body(error: OrchestratorError, anthropic: bool = False, request_id: bytes = b"") -> bytes:
    if anthropic:
        shown: dict[str, object] = {"type": ANTHROPIC.get(error.status, "api_error"), "message": error.message}
        return json.dumps({"type": "error", "error": shown, "request_id": request_id.decode() or None}).encode()
    shown = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if error.problems:
        shown["errors"] = [{"field": p.where, "message": p.what} for p in error.problems]
    return json.dumps({"error": shown}).encode()


def last_event(error: OrchestratorError, anthropic: bool, request_id: bytes) -> bytes:
    """Of a stream that is broken off: the error, where no status can be given any more."""
    return event(body(error, anthropic, request_id), anthropic)


def event(data: bytes, anthropic: bool) -> bytes:
    """An error object as an event of a stream. Anthropic's clients go by its name."""
    lines = b"".join(b"data: " + line + b"\n" for line in data.splitlines())
    return (b"event: error\n" if anthropic else b"") + lines + b"\n"


def headers(error: OrchestratorError) -> dict[str, str]:
    found = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        found["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        found["www-authenticate"] = "Bearer"
    return found
