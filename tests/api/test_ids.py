"""Each request has an id and a trace: the client's own where they can be used, else made here; the engine gets them, and each answer."""

import re
from pathlib import Path

import pytest

from tests.api.house import House, house
from tests.api.upstream import Exchange

QWEN = {"name": "qwen", "source": "org/qwen"}
CHAT = "/v1/chat/completions"
BODY = b'{"model":"qwen"}'
MADE = re.compile(rb"[0-9a-f]{32}")
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("way")]


async def exchanged(at: House, *headers: str) -> tuple[Exchange, bytes]:
    async with at.client() as client:
        await client.request(CHAT, BODY, *headers)
        exchange = await at.upstream.request()
        await exchange.answer(200, b"{}", (b"X-Request-Id", b"the engine's own"), (b"Traceparent", TRACE))
        answer = await client.answer()
        exchange.writer.transport.abort()
        (given,) = exchange.header(b"x-request-id")
        assert answer.header(b"x-request-id") == given
        assert [answer.header(b"traceparent")] == exchange.header(b"traceparent")
        return exchange, given


@pytest.mark.parametrize("given", ["r1", "req_011CSHoEeqs5C35K2UUqR7Fy", "a" * 200, "9f1b:x/y+z=@~-._"])
async def test_a_clients_own_id_goes_to_the_engine_and_back(folder: Path, given: str) -> None:
    async with house(folder, QWEN) as at:
        assert (await exchanged(at, f"X-Request-Id: {given}"))[1] == given.encode()


@pytest.mark.parametrize("given", [[], ["a" * 201], [""], ["a b"], ["a\tb"], ['a"b'], ["ž"], ["a,b"], ["<script>"], ["%0d%0a"]], ids=str)
async def test_where_there_is_none_or_nonsense_one_is_made(folder: Path, given: list[str]) -> None:
    async with house(folder, QWEN) as at:
        seen = {(await exchanged(at, *(f"X-Request-Id: {one}" for one in given)))[1] for _ in range(2)}
        assert len(seen) == 2
        assert all(MADE.fullmatch(one) for one in seen)


async def test_a_trace_goes_on_with_its_state(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        exchange, _ = await exchanged(at, f"traceparent: {TRACE.decode()}", "tracestate: a=1")
        assert exchange.header(b"traceparent") == [TRACE]
        assert exchange.header(b"tracestate") == [b"a=1"]


@pytest.mark.parametrize(
    "given",
    [
        None, "00-ab", TRACE.decode().upper(), "ff" + TRACE.decode()[2:], TRACE.decode() + "-x", f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
    ],
)  # fmt: skip
async def test_a_trace_that_is_none_is_made_anew_without_its_state(folder: Path, given: str | None) -> None:
    async with house(folder, QWEN) as at:
        exchange, request_id = await exchanged(at, *([] if given is None else [f"traceparent: {given}"]), "tracestate: a=1")
        (trace,) = exchange.header(b"traceparent")
        assert re.fullmatch(rb"00-%b-[0-9a-f]{16}-01" % request_id, trace), "a trace that begins here has the request's id"
        assert exchange.header(b"tracestate") == []


async def test_of_several_the_last_one_counts_and_one_is_sent(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        assert (await exchanged(at, "X-Request-Id: r1", "X-Request-Id: r2"))[1] == b"r2"


async def test_errors_of_our_own_bear_it_too(folder: Path) -> None:
    async with house(folder, QWEN) as at:
        for target, body, method in (
            (CHAT, b'{"model":"x"}', "POST"),
            (CHAT, b"", "GET"),
            ("/nowhere", b"", "GET"),
            ("/v1/models", b"", "GET"),
        ):
            answer = await at.post(target, body, "X-Request-Id: r1", method=method)
            assert answer.header(b"x-request-id") == b"r1", target
        assert MADE.fullmatch((await at.operate("GET", "/status")).header(b"x-request-id") or b"")
        async with at.client() as client:
            await client.send(b"nonsense\r\n\r\n")
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (400, "bad_http")
            assert MADE.fullmatch(answer.header(b"x-request-id") or b"")


async def test_requests_in_one_write_keep_their_own(folder: Path) -> None:
    async with house(folder, QWEN) as at, at.client() as client:
        one = b"GET /health HTTP/1.1\r\nHost: h\r\nX-Request-Id: r%d\r\n\r\n"
        await client.send(b"".join(one % n for n in range(3)))
        assert [(await client.answer()).header(b"x-request-id") for _ in range(3)] == [b"r0", b"r1", b"r2"]
