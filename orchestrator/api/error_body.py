"""An error of ours -> status, headers and an OpenAI error object. Formats only: the error's class decided what it means."""

import json
import math

from orchestrator.errors import OrchestratorError

# A fault of ours.
BUG = OrchestratorError("The daemon failed to answer this; its log has the traceback.", code="internal_error")


def body(error: OrchestratorError) -> bytes:
    inside: dict[str, object] = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if error.problems:
        inside["errors"] = [{"field": p.where, "message": p.what} for p in error.problems]
    return json.dumps({"error": inside}).encode()


def headers(error: OrchestratorError) -> dict[str, str]:
    found = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        found["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        found["www-authenticate"] = "Bearer"
    return found
