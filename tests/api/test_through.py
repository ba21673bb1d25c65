"""/upstream/{model}/…: everything of an engine, for operators and nobody else."""

from pathlib import Path

import pytest

from tests.api.house import House, house
from tests.api.rawclient import Answer, connected

QWEN = {"name": "org/qwen", "aliases": ["q"], "source": "org/qwen"}
ORG = {"name": "org", "source": "org/other", "preload": False}
KEY = "Authorization: Bearer sesame"

pytestmark = pytest.mark.asyncio


async def ask(at: House, method: str, target: str, body: bytes = b"", *headers: str, over_tcp: bool = False) -> Answer:
    async with connected(at.users if over_tcp else at.operators) as client:
        await client.request(target, body, *headers, method=method)
        return await client.answer()


@pytest.mark.parametrize(
    ("method", "target", "reached"),
    [
        ("GET", "/upstream/org/qwen/metrics", b"/metrics"),
        ("GET", "/upstream/q/version", b"/version"),
        ("GET", "/upstream/org%2Fqwen/metrics", b"/metrics"),
        ("POST", "/upstream/q/collective_rpc?a=%20b", b"/collective_rpc?a=%20b"),
        ("DELETE", "/upstream/q/v1/responses/resp_1", b"/v1/responses/resp_1"),
        ("GET", "/upstream/q", b"/"),
        ("GET", "/upstream/q/", b"/"),
        ("GET", "/upstream/q/%C5%BE%20x%3F", b"/%C5%BE%20x%3F"),
    ],
)
@pytest.mark.parametrize("over_tcp", [False, True])
async def test_any_method_and_path(folder: Path, method: str, target: str, reached: bytes, over_tcp: bool) -> None:
    async with house(folder, QWEN, ORG, key="sesame") as at, connected(at.users if over_tcp else at.operators) as client:
        await client.request(target, b"{}", KEY, "X-Api-Key: sk", method=method)
        exchange = await at.upstream.request()
        assert (exchange.target, exchange.body) == (reached, b"{}")
        assert not [pair for pair in exchange.headers if b"sesame" in pair[1] or pair[1] == b"sk"]
        assert at.seen("org/qwen").in_flight == 0
        await exchange.answer(418, b"tea", (b"X-Mine", b"1"))
        answer = await client.answer()
        assert (answer.status, answer.body, answer.header(b"x-mine")) == (418, b"tea", b"1")


async def test_a_stream_is_streamed_and_who_leaves_ends_it(folder: Path) -> None:
    async with house(folder, QWEN) as at, connected(at.operators) as client:
        await client.request("/upstream/q/v1/completions", b"{}")
        exchange = await at.upstream.request()
        await exchange.stream()
        await client.head()
        await exchange.chunk(b"data: 1\n\n")
        assert await client.chunk() == b"data: 1\n\n"
        client.leave()
        await exchange.left()


async def test_over_tcp_it_needs_the_admins_key_and_without_one_there_is_none(folder: Path) -> None:
    async with house(folder, QWEN, key="sesame") as at:
        for headers in ((), ("Authorization: Bearer other",)):
            answer = await ask(at, "GET", "/upstream/q/metrics", b"", *headers, over_tcp=True)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert at.upstream.untouched()


async def test_without_a_key_it_is_not_on_the_users_port(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        answer = await ask(at, "GET", "/upstream/q/metrics", over_tcp=True)
        assert (answer.status, answer.error["code"]) == (404, "route_not_found")
        assert at.upstream.untouched()


async def test_it_wakes_nobody(folder: Path) -> None:
    async with house(folder, QWEN, ORG) as at:
        answer = await ask(at, "GET", "/upstream/org/metrics")
        assert (answer.status, answer.error["code"]) == (409, "conflict")
        assert "orchestratorctl load org" in answer.error["message"]
        assert (await ask(at, "GET", "/upstream/nobody/metrics")).error["code"] == "model_not_found"
        assert at.state("org") == "stopped"
        assert at.upstream.untouched()
