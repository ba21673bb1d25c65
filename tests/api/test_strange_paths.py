"""No path that anybody could write reaches an engine but those of the table, in the table's own spelling."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.api.routes import TABLE, Model
from tests.api.standing import Standing, standing

BODY = b'{"model":"one","method":"kv_limit","level":1}'
PATHS = [route.path for route in TABLE if route.model in (Model.BODY, Model.FORM)]
WORDS = [
    "v1", "v2", "chat", "completions", "responses", "resp_1", "cancel", "messages", "audio", "transcriptions", "tokenize", "..", ".", "",
    "sleep", "wake_up", "collective_rpc", "load_lora_adapter", "metrics", "invocations", "upstream", "%2e%2e", "%2e", "..%2f", "%2F",
    "%5c", "%00", "%0a", "%25", "%252e%252e", "V1", ";", "?", "%3f", "#", "%23", "\\", "~", "*", "%c0%ae", "%c0%af", "%ff", "{id}",
    "resp_1%2fcancel",
]  # fmt: skip

joined = st.lists(st.sampled_from(WORDS), max_size=7).map(lambda words: "/" + "/".join(words))
cut = st.builds(
    lambda path, at, put: path[: at % len(path)] + put + path[at % len(path) :],
    st.sampled_from(PATHS),
    st.integers(0, 60),
    st.one_of(
        st.sampled_from(["/", "//", "/../", "/./", "%2f", "/%2e%2e/", ".", "%00", ";", "%20"]),
        st.text(st.characters(codec="ascii"), max_size=3),
    ),
)
escaped = st.builds(
    lambda path, at: path[: at % len(path)] + f"%{ord(path[at % len(path)]):02x}" + path[at % len(path) + 1 :],
    st.sampled_from(PATHS),
    st.integers(0, 60),
)
absolute = st.builds(lambda path, host: f"http://{host}{path}", joined, st.sampled_from(["engine", "h", "a@b", "[::1]", ""]))
methods = st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE"])


@pytest.fixture(scope="module")
def at() -> Iterator[Standing]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-api-") as path, standing(Path(path)) as made:
        made.post(b"/v1/responses", BODY)  # resp_1 is known from here on
        yield made


@given(method=methods, target=st.one_of(joined, cut, escaped, absolute))
@example("POST", "/v1/%63ompletions")
@example("GET", "/v1/responses/resp_1")
@example("POST", "/v1/responses/resp_1/cancel")
@example("GET", "/v1/responses/resp_1%2fcancel")
@example("POST", "/v1%2fcompletions")
@settings(derandomize=True, deadline=None, max_examples=600)
def test_only_the_tables_paths_reach_an_engine(at: Standing, method: str, target: str) -> None:
    at.reached.clear()
    status, _ = at.post(target.encode(), BODY, b"Content-Type: application/json", method=method.encode())
    assert status < 500
    for reached, _ in at.reached:
        path = reached.decode().partition("?")[0]
        assert path in PATHS if method == "POST" and not path.endswith("/cancel") else re.fullmatch("/v1/responses/resp_1(/cancel)?", path)
        assert "%" not in path
        asked = re.sub("^http://[^/]*", "", target).partition("#")[0].partition("?")[0]
        assert unquote_to_bytes(asked) == path.encode(), "another path was meant"
        assert "%2f" not in asked.lower()
    assert bool(at.reached) == (status == 200)
