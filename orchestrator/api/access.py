"""A line for each request that is for a model, written when its fate is known (log.access)."""

import logging

from orchestrator.api.fate import Fate

log = logging.getLogger("orchestrator.access")


def told(fate: Fate) -> None:
    usage, first_s = fate.usage, fate.first_s
    tokens = f"{usage.prompt_tokens}+{usage.completion_tokens}" if usage else "-"
    first = "-" if first_s is None else f"{first_s:.3f}s"
    line = "%s %s %s %s %d: %s tokens, waited %.3fs, first %s, total %.3fs"
    fields = {
        "kind": "request",
        "request_id": fate.ids.request_id.decode("latin-1"),
        "who": fate.who,
        "model": fate.model,
        "route": fate.route,
        "status": fate.status,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "wait_s": round(fate.wait_s, 4),
        "first_s": None if first_s is None else round(first_s, 4),
        "total_s": round(fate.total_s, 4),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    who, model = fate.who or "-", fate.model or "-"
    log.info(
        line, fields["request_id"], who, model, fate.route, fate.status, tokens, fate.wait_s, first, fate.total_s, extra={"told": given}
    )
