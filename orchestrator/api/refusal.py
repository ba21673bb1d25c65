"""What a connection says by itself, without the application: a whole answer, after which it is closed."""

from http import HTTPStatus

from orchestrator.api import error_body
from orchestrator.api.ids import Ids, ids
from orchestrator.errors import BadRequest, OrchestratorError


def whole(error: OrchestratorError, headers: list[tuple[bytes, bytes]], anthropic: bool = False, given: Ids | None = None) -> bytes:
    """An answer, of a connection that is closed after it."""
    own = given or ids(None, None)
    body = error_body.body(error, anthropic, own.request_id)
    says = [(name.encode(), value.encode()) for name, value in error_body.headers(error).items()]
    ours = [(b"x-request-id", own.request_id), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    if given is not None:
        ours.append((b"traceparent", own.traceparent))
    if anthropic:
        ours.append((b"request-id", own.request_id))
    lines = [b"HTTP/1.1 %d %b" % (error.status, HTTPStatus(error.status).phrase.encode())]
    lines += [b"%b: %b" % pair for pair in (*headers, *says, *ours)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def head_too_large(headers: int, size_bytes: int) -> BadRequest:
    error = BadRequest(f"The head of the request is too large: at most {headers} headers and {size_bytes} bytes.", code="head_too_large")
    error.status = 431
    return error


def too_slow(after_s: float) -> BadRequest:
    error = BadRequest(f"The rest of the request did not come within {after_s:.0f} s.", code="request_too_slow")
    error.status = 408
    return error
