"""The `model` field of a multipart form (RFC 7578), wherever in the body it stands: the parts are passed over, and nothing is kept of them.

Strict: what two readers could take for two different things is refused, so the engine finds the model that was found here. Of a field
that comes twice the last one counts, as there. No package for that: the usual parser copies each part, and this is a search.
"""

import re

from orchestrator.errors import BadRequest

MOST_PARTS = 256
HEAD_BYTES = 8 << 10  # of one part
NAME_BYTES = 512  # of a model; and of the Content-Type
CONTENT_TYPE = re.compile(rb'multipart/form-data\s*;(?:.*;)?\s*boundary=("?)([0-9A-Za-z\'()+_,./:=?-]{1,70})\1\s*(?:;.*)?', re.I | re.S)
DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition[ \t]*:[ \t]*form-data((?:[^\r\n])*)", re.I)
NAME = re.compile(rb';[ \t]*name[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.I)
FILE = re.compile(rb";[ \t]*filename\*?[ \t]*=", re.I)


def model_of(content_type: bytes, body: bytes) -> str:
    """Raises BadRequest where there is none, or the body is no such form."""
    given = CONTENT_TYPE.fullmatch(content_type.strip()) if len(content_type) < NAME_BYTES else None
    if given is None:
        raise BadRequest("The request must be a form: Content-Type: multipart/form-data; boundary=…")
    mark = b"--" + given[2]
    model: str | None = None
    at = 0 if body.startswith(mark) else _next(body, mark, 0)
    for _ in range(MOST_PARTS):
        at += len(mark)
        if body.startswith(b"--\r\n", at) or (len(body) == at + 2 and body.endswith(b"--")):
            if model is None:
                raise BadRequest(
                    "The form field `model` is missing: name one of GET /v1/models.", param="model", code="missing_required_parameter"
                )
            return model
        if not body.startswith(b"\r\n", at):
            raise _bad("a boundary does not end its line")
        head_end = body.find(b"\r\n\r\n", at, at + HEAD_BYTES)
        if head_end < 0:
            raise _bad("the head of a part does not end")
        head = body[at + 2 : head_end]
        at = _next(body, mark, head_end + 2)
        if _is_model(head):
            model = _text(body[head_end + 4 : at - 2])
    raise _bad(f"it has more than {MOST_PARTS} parts")


def _next(body: bytes, mark: bytes, start: int) -> int:
    """Where the next boundary begins that is at the start of a line."""
    found = body.find(b"\r\n" + mark, start)
    if found < 0:
        raise _bad("its last boundary is missing")
    return found + 2


def _is_model(head: bytes) -> bool:
    disposition = DISPOSITION.findall(head)
    if len(disposition) != 1:
        raise _bad("each part needs one Content-Disposition: form-data")
    names = NAME.findall(disposition[0])
    if len(names) != 1:
        raise _bad("each part needs one name")
    if (names[0][0] or names[0][1]) != b"model":
        return False
    if FILE.search(disposition[0]):
        raise BadRequest("The form field `model` must be text, not a file.", param="model")
    return True


def _text(value: bytes) -> str:
    try:
        if 0 < len(value) <= NAME_BYTES:
            return value.decode()
    except UnicodeDecodeError:
        pass
    raise BadRequest(f"The form field `model` must be a name, in UTF-8 and of at most {NAME_BYTES} bytes.", param="model")


def _bad(why: str) -> BadRequest:
    return BadRequest(f"The request body is no form as its Content-Type says: {why}.")
