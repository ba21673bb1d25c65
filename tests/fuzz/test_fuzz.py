"""A short run of each fuzzer, the same cases each time; `python -m tests.fuzz` goes on from there for as long as it is told."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import schema
from tests.fuzz.answers import KINDS, say_all
from tests.fuzz.ground import GROWTH_BYTES, Ground, ground
from tests.fuzz.raw import Counts, send, send_all
from tests.fuzz.requests import MUTATIONS, UPGRADE, Case

pytestmark = [pytest.mark.xdist_group("fuzz"), pytest.mark.timeout(300)]
ROUND = 500


@pytest.fixture(scope="module")
def at() -> Iterator[Ground]:
    with ground() as made:
        yield made


def test_whatever_is_sent_is_answered_in_order_and_leaves_nothing(at: Ground) -> None:
    counts = Counts()
    asyncio.run(send_all(at.address, at.model, 1, range(ROUND), counts))
    at.until_at_rest()
    before = at.rss_bytes
    asyncio.run(send_all(at.address, at.model, 1, range(ROUND, 2 * ROUND), counts))
    at.until_at_rest()
    assert counts.wrong == []
    assert (counts.cases, set(counts.by_mutation)) == (2 * ROUND, set(MUTATIONS))
    assert counts.by_outcome["200"] > 100
    assert at.rss_bytes - before < GROWTH_BYTES


HANDSHAKE = b"GET /v1/realtime?model=nobody HTTP/1.1\r\nHost: h\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in UPGRADE)
POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
FOUND = {
    "a handshake with a body": (HANDSHAKE + b"Content-Length: 2\r\n\r\n{}", ["400"]),
    "a handshake with a body in chunks": (HANDSHAKE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ["400"]),
    "what is asked to go on and is broken already": (POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n", ["400"]),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_once(at: Ground, found: str) -> None:
    raw, statuses = FOUND[found]
    assert asyncio.run(send(at.address, Case(found, [raw]))) == statuses
    at.until_at_rest()


def test_leaving_after_several_requests_in_one_write(at: Ground) -> None:
    one = b'{"model":"%b","prompt":"x","max_tokens":3000}' % at.model.encode()
    raw = POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(one) + one
    assert asyncio.run(send(at.address, Case("left", [raw * 3], leaves=True))) == ["left"]
    at.until_at_rest()


def test_requests_of_the_openapi_document_are_answered_as_it_says(at: Ground) -> None:
    cases, said = schema.run(at, seed=1, examples=2)
    at.until_at_rest()
    assert said == ""
    assert cases > 250


def test_whatever_an_engine_says_the_next_request_is_answered_right() -> None:
    counts = Counts()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="o-api-") as folder:
        asyncio.run(say_all(Path(folder), 1, range(800), counts))
    assert counts.wrong == []
    assert set(counts.by_mutation) == KINDS
