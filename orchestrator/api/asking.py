"""What a request says of itself: in its body for which model and how much, in its headers who asks, how urgently, how patiently.

Read once, before it may wait. Only what this daemon acts on is looked at: the rest is its engine's to judge. Of a key that comes twice
the last one counts, as in Python's json: the engine finds the same model.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from starlette.types import Scope

from orchestrator.api import form
from orchestrator.api.routes import RESPONSES, Model, Route
from orchestrator.control.keys import Caller, Keys, is_here
from orchestrator.control.traffic import TELL_S, Ask, Asker
from orchestrator.errors import BadRequest

UNBOUNDED_TOKENS = 1 << 30
COUNT_DIGITS = 9  # of a count of tokens that is one; a larger number is no bound
ABSENT = msgspec.Raw(b"")
LIKELY_TOKENS = 256  # of an answer, for guessing what a queue needs
OWN_HEADERS = frozenset({b"x-priority", b"x-progress", b"x-request-timeout"})  # said to this daemon
# What SDKs say of their own timeouts, in seconds. The first is the time between two reads (Python: openai, anthropic), the second that
# to the head of the answer (JavaScript: both; Python's anthropic sends it beside the first). Both bound silence, not the whole.
SILENCE = (b"x-stainless-read-timeout", b"x-stainless-timeout")
SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]*)?")
PRIORITY = re.compile(rb"[+-]?[0-8]")


class _Peek(msgspec.Struct):
    """All that is looked at of a body. Lengths are not even decoded here: whether they are right is the engine's to say."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    stream: msgspec.Raw = ABSENT
    stream_options: msgspec.Raw = ABSENT
    max_tokens: msgspec.Raw = ABSENT
    max_completion_tokens: msgspec.Raw = ABSENT
    max_output_tokens: msgspec.Raw = ABSENT
    previous_response_id: msgspec.Raw = ABSENT
    background: msgspec.Raw = ABSENT


_decode = msgspec.json.Decoder(_Peek).decode


class Asking(NamedTuple):
    """`previous`: the response that it goes on with, where that names the model. `progress`: it wants to be told what it waits for.
    `streams`, and `wants_usage` of a stream. `background`: its work goes on when it has been answered."""

    route: Route
    model: str
    ask: Ask
    asker: Asker
    previous: str = ""
    progress: bool = False
    streams: bool = False
    wants_usage: bool = False
    background: bool = False


def read(route: Route, headers: Mapping[bytes, bytes], body: bytes, caller: Caller) -> Asking:
    """Raises BadRequest unless its body has a model in it, and the headers that are for us can be understood."""
    if route.model is Model.FORM:
        # How many tokens a sound has is not told by its bytes.
        ask = Ask(UNBOUNDED_TOKENS, first=0, likely=LIKELY_TOKENS)
        model = form.model_of(headers.get(b"content-type", b""), body)
        return Asking(route, model, ask, asker_of(headers, caller))
    peek = _peek(body)
    streams = route.streams and bytes(peek.stream) == b"true"
    progress = _wants_progress(headers) and streams
    asker = asker_of(headers, caller, progress)
    ask = _ask(peek, len(body))
    if route is RESPONSES:
        previous = "" if peek.model else _text(peek.previous_response_id)
        if not previous:
            _check_model(peek)
        background = bytes(peek.background) == b"true"
        return Asking(route, str(peek.model or ""), ask, asker, previous, progress, streams, background=background)
    _check_model(peek)
    return Asking(route, str(peek.model), ask, asker, "", progress, streams, streams and _wants_usage(peek))


def asker_of(headers: Mapping[bytes, bytes], caller: Caller, progress: bool = False) -> Asker:
    """Raises BadRequest."""
    return Asker(caller.client, caller.urgency(_priority(headers)), _patience_s(headers, progress), caller.weight)


def caller_of(keys: Keys, scope: Scope, headers: Mapping[bytes, bytes]) -> Caller:
    """Raises Unauthorized."""
    return keys.caller(headers, address_of(scope, headers))


def address_of(scope: Scope, headers: Mapping[bytes, bytes]) -> str:
    """Whence it comes; where that is this machine, whence a proxy here says that it comes. "" of a unix socket."""
    address: str = (scope.get("client") or ("",))[0]
    if is_here(address) and (named := headers.get(b"x-forwarded-for")):
        return named.rpartition(b",")[2].strip().decode("latin-1")
    return address


def _priority(headers: Mapping[bytes, bytes]) -> int | None:
    given = headers.get(b"x-priority")
    if given is None:
        return None
    if not PRIORITY.fullmatch(given):
        raise _bad("X-Priority", given, "an integer from -8 to 8")
    return int(given)


def _patience_s(headers: Mapping[bytes, bytes], progress: bool) -> float | None:
    """The shortest time after which the client says it will have left, less a moment so that it still hears why.

    Who is told what goes on is not in silence: only a timeout that is nearly as short as the pauses counts then.
    """
    shortest = math.inf
    for name in SILENCE:
        if name in headers and (silence := _seconds(headers[name])) and (not progress or silence <= 2 * TELL_S):
            shortest = min(shortest, silence)
    if (own := headers.get(b"x-request-timeout")) is not None:
        if not (whole := _seconds(own)):
            raise _bad("X-Request-Timeout", own, "a number of seconds above 0")
        shortest = min(shortest, whole)
    return None if shortest == math.inf else shortest - min(1.0, shortest / 10)


def _seconds(given: bytes) -> float:
    """0 for what is none: an SDK whose timeout is off writes None, NOT_GIVEN, 0 or infinity."""
    return float(given) if SECONDS.fullmatch(given) else 0.0


def _wants_progress(headers: Mapping[bytes, bytes]) -> bool:
    given = headers.get(b"x-progress")
    if given is not None and given.lower() != b"sse":
        raise _bad("X-Progress", given, "`sse`")
    return given is not None


def _bad(name: str, given: bytes, wanted: str) -> BadRequest:
    return BadRequest(f"The header {name} is {given.decode('latin-1')!r}: it must be {wanted}, or left out.", param=name)


def _peek(body: bytes) -> _Peek:
    try:
        peek = _decode(body)
    except msgspec.ValidationError as error:
        what = "`model` must be a string" if "$.model" in str(error) else "the request body must be a JSON object"
        raise BadRequest(f"Bad request: {what}.", param="model" if "model" in what else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not JSON: {error}") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.") from None
    return peek


def _check_model(peek: _Peek) -> None:
    if not peek.model or not isinstance(peek.model, str):
        raise BadRequest("The field `model` is missing: name one of GET /v1/models.", param="model", code="missing_required_parameter")


def _text(raw: msgspec.Raw) -> str:
    """ "" for what is none."""
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _wants_usage(peek: _Peek) -> bool:
    try:
        options = msgspec.json.decode(peek.stream_options) if peek.stream_options is not ABSENT else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True  # it is the engine's to refuse
    return isinstance(options, dict) and options.get("include_usage") is True


def _ask(peek: _Peek, body_bytes: int) -> Ask:
    """Byte-level tokenizers never make more tokens than bytes; English text makes about a quarter. An answer without a bound may
    fill its model's context, whose length policy knows."""
    answer = None
    for raw in (peek.max_completion_tokens, peek.max_tokens, peek.max_output_tokens):
        if raw is not ABSENT and (text := bytes(raw)).isdigit() and len(text) <= COUNT_DIGITS and (bound := int(text)) > 0:
            answer = bound if answer is None else min(answer, bound)
    most = body_bytes + (UNBOUNDED_TOKENS if answer is None else answer)
    return Ask(most, first=body_bytes, likely=body_bytes // 4 + min(answer or LIKELY_TOKENS, LIKELY_TOKENS))
