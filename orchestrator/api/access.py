"""A line for each request that is for a model, written when its fate is known (log.access)."""

import logging

from orchestrator.control.keys import Usage

log = logging.getLogger("orchestrator.access")


def told(
    request_id: bytes,
    who: str,
    model: str,
    route: str,
    status: int,
    usage: Usage | None,
    wait_s: float,
    first_s: float | None,
    total_s: float,
) -> None:
    """`who`: a key's name, or an address. `wait_s`: for its turn, or its model. `first_s`: until its stream's first event."""
    tokens = f"{usage.prompt_tokens}+{usage.completion_tokens}" if usage else "-"
    first = "-" if first_s is None else f"{first_s:.3f}s"
    line = "%s %s %s %s %d: %s tokens, waited %.3fs, first %s, total %.3fs"
    fields = {
        "kind": "request",
        "request_id": request_id.decode("latin-1"),
        "who": who,
        "model": model,
        "route": route,
        "status": status,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "wait_s": round(wait_s, 4),
        "first_s": None if first_s is None else round(first_s, 4),
        "total_s": round(total_s, 4),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    log.info(line, fields["request_id"], who or "-", model or "-", route, status, tokens, wait_s, first, total_s, extra={"told": given})
