"""The model of a form: found wherever it stands, by whatever client wrote the form, and the body goes on unchanged. Whatever else comes
is a 4xx: never a 500, never a hang, and never another model than a full parser finds."""

import email.parser
import email.policy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.api.form import HEAD_BYTES, MOST_PARTS, model_of
from orchestrator.errors import BadRequest
from tests.api.standing import Standing, standing

KIND = b"multipart/form-data; boundary=b"
PATH = b"/v1/audio/transcriptions"


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name, more, value)


MODEL = part(b"model", b"one")
FILE = part(b"file", bytes(range(256)) * 5 + b"\r\n--\r\n-b\r\n--c--\r\n", b'; filename="a.wav"\r\nContent-Type: audio/wav')
END = b"--b--\r\n"


def full(body: bytes) -> str | None:
    """What Python's own mail parser finds."""
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(b"Content-Type: " + KIND + b"\r\n\r\n" + body)
    found = [p for p in message.iter_parts() if p.get_param("name", header="content-disposition") == "model"]
    payload = found[-1].get_payload(decode=True) if found else None
    return payload.decode() if isinstance(payload, bytes) else None


@pytest.mark.parametrize(
    "body",
    [
        MODEL + FILE + END,
        FILE + MODEL + END,
        FILE + MODEL + FILE + b"--b--",
        b"a preamble\r\n" + MODEL + END,
        MODEL + b"--b--\r\nan epilogue with --b",
        part(b"model", b"two") + MODEL + END,
        MODEL.replace(b'"model"', b"model") + END,
        MODEL.replace(b"Content-Disposition", b"CONTENT-DISPOSITION").replace(b"name=", b"Name = ") + END,
        MODEL.replace(b"\r\n\r\none", b"\r\nContent-Type: text/plain; charset=utf-8\r\n\r\none") + END,
        b'--b\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name="model"\r\n\r\none\r\n' + END,
        part(b"language", b"model") + MODEL + END,
        part(b"Model", b"two") + part(b"model[]", b"two") + MODEL + END,
        part(b"file", b'name="model"\r\n\r\ntwo', b'; filename="model"') + MODEL + END,
        part(b"file", b"x" * 5_000_000, b'; filename="a"') + MODEL + END,
    ],
)
def test_it_is_found(body: bytes) -> None:
    assert model_of(KIND, body) == "one"


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        (b'multipart/form-data; boundary="x"', b"x"),
        (b"Multipart/Form-Data;boundary=x", b"x"),
        (b"multipart/form-data; charset=utf-8; boundary=x", b"x"),
        (b"multipart/form-data; boundary=x; charset=utf-8", b"x"),
        (b"multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW", b"----WebKitFormBoundary7MA4YWxkTrZu0gW"),
        (b"multipart/form-data; boundary=------------------------d74496d66958873e", b"------------------------d74496d66958873e"),
    ],
)
def test_boundaries_as_clients_write_them(kind: bytes, boundary: bytes) -> None:
    assert model_of(kind, (FILE + MODEL + END).replace(b"--b", b"--" + boundary)) == "one"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "last boundary is missing"),
        (b"{}", "last boundary is missing"),
        (MODEL, "last boundary is missing"),
        (MODEL + b"--b", "does not end its line"),
        (MODEL + b"--bb\r\n\r\n\r\n" + END, "does not end its line"),
        (FILE + END, "`model` is missing"),
        (END, "`model` is missing"),
        (part(b"model", b"") + END, "must be a name"),
        (part(b"model", b"\xff") + END, "must be a name"),
        (part(b"model", b"x" * 513) + END, "must be a name"),
        (part(b"model", b"one", b'; filename="x"') + END, "not a file"),
        (part(b"model", b"one", b"; filename*=utf-8''x") + END, "not a file"),
        (b"--b\r\n\r\none\r\n" + END, "one Content-Disposition"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\none\r\n" + END, "one name"),
        (b'--b\r\nContent-Disposition: form-data; name="a"; name="model"\r\n\r\none\r\n' + END, "one name"),
        (b"--b\r\nX: " + b"x" * HEAD_BYTES + b"\r\n\r\n\r\n" + END, "head of a part"),
        (part(b"x", b"y") * (MOST_PARTS + 1) + END, "more than 256 parts"),
        (MODEL.replace(b"\r\n", b"\n") + END, "last boundary|end its line"),
    ],
)
def test_what_is_no_such_form_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        model_of(KIND, body)


@pytest.mark.parametrize(
    "kind",
    [b"", b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=b", b"multipart/form-data; boundary=",
     b"multipart/form-data; boundary=" + b"b" * 71, b'multipart/form-data; boundary="b', b"multipart/form-data; boundary=b\x01",
     b"multipart/form-data;" + b" ;" * 1000 + b"boundary=b"],
)  # fmt: skip
def test_what_is_not_called_a_form_is_refused(kind: bytes) -> None:
    with pytest.raises(BadRequest, match="must be a form"):
        model_of(kind, MODEL + END)


pieces = st.one_of(
    st.sampled_from(
        [MODEL, FILE, END, b"--b", b"--b\r\n", b"\r\n", b"--", b"\r\n\r\n", b'name="model"', b"Content-Disposition: form-data", b";", b"\n",
         b'Content-Disposition: form-data; name="model"\r\n', b'; filename="x"', b"\\", b'"', part(b"model", b"two"), part(b"a", b"b")]
    ),
    st.binary(max_size=8),
)  # fmt: skip
bodies = st.lists(pieces, max_size=12).map(b"".join)


@given(bodies)
@settings(derandomize=True, deadline=None, max_examples=1500)
def test_whatever_comes_is_a_name_or_a_400_and_the_name_is_that_of_a_full_parser(body: bytes) -> None:
    try:
        found = model_of(KIND, body)
    except BadRequest:
        return
    # The mail parser takes a bare newline for the end of a line, which no form has.
    if b"\n" not in body.replace(b"\r\n", b"") and b"\r" not in body.replace(b"\r\n", b""):
        assert found == full(body)


@pytest.fixture(scope="module")
def at() -> Iterator[Standing]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-api-") as path, standing(Path(path), 64 << 10) as made:
        yield made


@given(bodies)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_form_goes_on_unchanged_or_not_at_all(at: Standing, body: bytes) -> None:
    at.reached.clear()
    status, answer = at.post(PATH, body, b"Content-Type: " + KIND)
    assert status in (200, 400, 404), answer
    if status == 200:
        assert at.reached == [(PATH, body)]
    else:
        assert at.reached == []
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
keys = st.sampled_from(
    ['"model"', '"\\u006dodel"', '"stream"', '"max_tokens"', '"previous_response_id"', '"stream_options"', '"x"', '"mod\\u0065l"']
)
fields = st.tuples(keys, st.one_of(values.map(json.dumps), st.sampled_from(['"one"', '"two"', "true", "1e999", '"one\\u0000"', "[", "-"])))
objects = st.lists(fields, max_size=6).map(lambda pairs: "{" + ",".join(f"{key}: {value}" for key, value in pairs) + "}")
json_bodies = st.one_of(
    objects.map(str.encode),
    st.binary(max_size=40),
    st.builds(lambda o, at, b: o.encode()[:at] + b + o.encode()[at:], objects, st.integers(0, 30), st.binary(max_size=3)),
)
paths = st.sampled_from([b"/v1/chat/completions", b"/v1/responses", b"/v1/messages", b"/rerank"])


@given(paths, json_bodies)
@settings(derandomize=True, deadline=None, max_examples=800)
def test_a_body_is_routed_by_the_model_that_pythons_json_finds_or_refused(at: Standing, path: bytes, body: bytes) -> None:
    """vLLM reads with it: of a key that comes twice, the last one."""
    at.reached.clear()
    status, answer = at.post(path, body, b"Content-Type: application/json")
    assert status in (200, 400, 404), answer
    if status == 200:
        assert at.reached == [(path, body)]
        try:
            read = json.loads(body)
        except UnicodeDecodeError:
            return  # outside `model`: its engine refuses it
        assert read["model"] == "one"


@given(st.binary(max_size=60), st.integers(0, 80))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_chunked_bodies_however_broken_are_answered_or_cut(at: Standing, body: bytes, length: int) -> None:
    raw = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        length,
        body,
    )
    if len(body) < length:
        raw += b"x" * (length - len(body)) + b"\r\n0\r\n\r\n"
    status, answer = at.say(raw)
    assert status in (0, 200, 400, 404), answer
