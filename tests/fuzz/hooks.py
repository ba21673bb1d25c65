"""What Schemathesis is told of this endpoint: mostly a model that there is, and that a body which names none is refused."""

import os
import zlib
from typing import Any

import schemathesis

MODEL = os.environ.get("FUZZ_MODEL", "")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    given = body.get("model") if isinstance(body, dict) else None
    is_replaced = isinstance(given, str) and given and zlib.crc32(given.encode("utf-8", "replace")) % 5
    return {**body, "model": MODEL} if is_replaced else body


@schemathesis.check
def without_a_model_it_is_refused(context: Any, response: Any, case: Any) -> None:
    body = case.body
    if case.method == "POST" and isinstance(body, dict) and "previous_response_id" not in body:
        named = isinstance(body.get("model"), str) and body["model"] != ""
        assert named or response.status_code >= 400, f"a {response.status_code} without a model"
