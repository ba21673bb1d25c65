"""Two ways through the proxy: direct, for what need not wait, and by ASGI. Nobody can tell them apart, and direct is what is usual."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from orchestrator.api import exchange, upstream
from orchestrator.api.connection import Connection
from orchestrator.api.proxy import Proxy
from orchestrator.control.traffic import Door
from tests.api.doorway import Doorway, doorway
from tests.api.rawclient import Answer, Client, Cut
from tests.api.upstream import Exchange
from tests.support.eventually import eventually

CHAT = "/v1/chat/completions"
BODY = b'{"model":"one"}'
STREAM = b'{"model":"one","stream":true}'
OWN = {b"date", b"x-request-id", b"traceparent"}

pytestmark = pytest.mark.asyncio


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Doorway]:
    async with doorway(folder, max_body_bytes=1000) as found:
        found.door()
        yield found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of requests that go by ASGI."""
    seen: list[str] = []
    inner = Proxy.__call__

    async def counted(self: Proxy, route: object, scope: dict[str, object], *rest: object) -> None:
        seen.append(str(scope["path"]))
        await inner(self, route, scope, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Proxy, "__call__", counted)
    return seen


def whole(target: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {target} HTTP/{version}", "Host: h", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def test_what_need_not_wait_goes_directly(folder: Path, asked: list[str]) -> None:
    async with opened(folder) as at:
        async with at.client() as client:
            for turn in range(3):  # on a new connection to the engine, and on a kept one
                await client.request(CHAT, BODY)
                await (await at.upstream.request()).answer(200, b"%d" % turn)
                assert (await client.answer()).body == b"%d" % turn
                await client.request(CHAT, STREAM)
                exchange = await at.upstream.request()
                await exchange.stream()
                assert (await client.head()).header(b"x-accel-buffering") == b"no"
                for part in (b"data: 1\n\n", b"data: 2\n\n"):
                    await exchange.chunk(part)
                    assert await client.chunk() == part
                await exchange.end()
                assert await client.chunk() == b""
            await at.until_counts(0, 0)
        assert asked == []
        assert at.upstream.connections == 1


async def test_a_client_that_leaves_in_the_turn_of_the_connect_asks_the_engine_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves: list[Callable[[], None]] = []
    begin, connect = exchange.Exchange.begin, upstream.Upstream.connect

    def noted(self: exchange.Exchange) -> None:
        leaves.append(self._connection.peer.left)
        begin(self)

    async def then_left(self: upstream.Upstream) -> upstream.Answer:
        answer = await connect(self)
        asyncio.get_running_loop().call_soon(leaves.pop())  # after this task is done, and before anybody hears of that
        return answer

    monkeypatch.setattr(exchange.Exchange, "begin", noted)
    monkeypatch.setattr(upstream.Upstream, "connect", then_left)
    async with opened(folder) as at, at.client() as client:
        await client.request(CHAT, BODY)
        await eventually(lambda: at.upstream.connections == 1 and at.upstream.open == 0, "its connection to the engine is closed")
        assert at.upstream.arrived.empty()
        await at.until_counts(0, 0)


@pytest.mark.parametrize("request_", [whole(CHAT, BODY), whole(CHAT + "?a=b", BODY)], ids=["direct", "asgi"])
async def test_a_connection_that_is_over_is_gone_without_the_collector(folder: Path, request_: bytes) -> None:
    """As cycles they would be the most of what it finds: 45 objects a connection, and a heap that swells and shrinks."""

    def left() -> list[object]:
        return [found for found in gc.get_objects() if type(found) in (Connection, exchange.Exchange, upstream.Answer)]

    async with opened(folder) as at:
        gc.collect()
        before = len(left())
        gc.disable()
        try:
            async with at.client() as client:
                await client.send(request_)
                asked = await at.upstream.request()
                assert len(left()) > before
                await asked.answer(200, b"{}", (b"Connection", b"close"))
                assert (await client.answer()).status == 200
            await eventually(lambda: len(left()) == before, "its connections are gone")
        finally:
            gc.enable()


@pytest.mark.parametrize(
    "request_",
    [
        whole(CHAT, BODY, "X-Progress: sse"),
        whole(CHAT + "?a=b", BODY),
        whole("/v1/%63hat/completions", BODY),
        whole("/v1/responses", BODY),
        whole(CHAT, BODY, "Connection: close"),
        whole(CHAT, BODY, version="1.0"),
    ],
    ids=["progress", "query", "escaped", "responses", "close", "1.0"],
)
async def test_what_is_not_usual_goes_by_asgi(folder: Path, asked: list[str], request_: bytes) -> None:
    async with opened(folder) as at:
        async with at.client() as client:
            await client.send(request_.replace(BODY, STREAM).replace(b": 15\r", b": 29\r") if b"rogress" in request_ else request_)
            await (await at.upstream.request()).answer(200, b"{}")
            assert (await client.answer()).status == 200
        assert len(asked) == 1


@pytest.mark.parametrize("cut", [3, len(whole(CHAT, BODY)) - len(BODY), len(whole(CHAT, BODY)) - 1])
async def test_a_request_in_pieces_is_whole(folder: Path, asked: list[str], cut: int) -> None:
    async with opened(folder) as at:
        request = whole(CHAT, BODY)
        async with at.client() as client:
            await client.send(request[:cut])
            await at.until_counts(0, 0)
            await client.send(request[cut:])
            exchange = await at.upstream.request()
            assert exchange.body == BODY
            await exchange.answer(200, b"{}")
            assert (await client.answer()).body == b"{}"


@pytest.mark.parametrize("why", ["full", "shut", "unknown", "too large", "no model"])
async def test_what_must_wait_or_is_refused_goes_by_asgi_and_holds_nothing(folder: Path, asked: list[str], why: str) -> None:
    async with opened(folder) as at:
        doors = {"shut": Door(None, retry_after_s=0.1), "full": Door("one", max_concurrency=0)}
        at.traffic.publish({"one": doors.get(why, Door("one"))})
        bodies = {"unknown": b'{"model":"two"}', "too large": b'{"model":"one","a":"%b"}' % (b"x" * 1000), "no model": b"{}"}
        async with at.client() as client:
            await client.request(CHAT, bodies.get(why, BODY))
            if why in bodies:
                assert (await client.answer()).status == {"unknown": 404, "too large": 413, "no model": 400}[why]
            else:
                await at.until_counts(0, 1)
                at.door()
                await (await at.upstream.request()).answer(200, b"{}")
                assert (await client.answer()).status == 200
            await at.until_counts(0, 0)
        assert asked == [CHAT]


ANSWERS = {
    "plain": [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nX-Own: 1\r\n\r\n{}"],
    "in pieces": [b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\n{", b"12}"],
    "chunked": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b"1\r\n\n\r\n0\r\n\r\n"],
    "empty": [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"],
    "an error": [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 11\r\nConnection: close\r\n\r\n", b'{"error":1}'],
    "interim": [b"HTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
    "a stream": [
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nDate: no\r\n\r\n9\r\ndata: 1\n\n\r\n",
        b"9\r\ndata: 2\n\n\r\n0\r\n\r\n",
    ],
    "a stream with a length": [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: 1\n\n"],
}  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_both_ways_say_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], path: str, answer: list[bytes]
) -> None:
    async def once() -> tuple[object, object]:
        async with opened(folder) as at, at.client() as client:
            await client.request(path, BODY, "X-Request-Id: r1")
            exchange = await at.upstream.request()
            for part in answer:
                await exchange.send(part)
            exchange.over.set()
            found = await client.answer()
            assert found.header(b"x-request-id") == b"r1"
            return _shown(found), (sorted(pair for pair in exchange.headers if pair[0] not in OWN), exchange.body)

    direct = await once()
    assert asked == []
    monkeypatch.setattr(Proxy, "direct", lambda proxy, connection, body: None)
    (folder / "engine.sock").unlink(missing_ok=True)
    assert await once() == direct
    assert asked == [path]


def _shown(answer: Answer) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return answer.status, sorted(pair for pair in answer.headers if pair[0] not in OWN), answer.body


async def test_requests_in_one_write_are_answered_in_their_order(folder: Path, asked: list[str]) -> None:
    async with opened(folder) as at:
        async with at.client() as client:
            await client.send(whole(CHAT, BODY) + whole("/v1/completions", BODY) + whole("/score", BODY))
            exchanges: list[Exchange] = []
            for number in range(3):
                exchanges.append(await at.upstream.request())
                assert at.upstream.arrived.empty()
                await exchanges[-1].answer(200, b"%d" % number)
                assert (await client.answer()).body == b"%d" % number
            assert [exchange.target for exchange in exchanges] == [CHAT.encode(), b"/v1/completions", b"/score"]
        assert asked == ["/v1/completions", "/score"]


async def test_a_connection_whose_engine_gave_no_answer_is_closed_and_its_place_comes_back(folder: Path) -> None:
    async with opened(folder) as at:
        async with at.client() as client:
            await client.request("/v1/messages", BODY)
            (await at.upstream.request()).die()
            refused = await client.answer()
            assert (refused.status, refused.header(b"connection"), refused.header(b"retry-after")) == (502, b"close", b"5")
            assert refused.json["request_id"].encode() == refused.header(b"x-request-id") == refused.header(b"request-id")
            assert await client.reader.read() == b""
        await at.until_counts(0, 0)


async def test_nonsense_behind_a_request_ends_both(folder: Path) -> None:
    async with opened(folder) as at:
        async with at.client() as client:
            await client.send(whole(CHAT, BODY))
            exchange = await at.upstream.request()
            await client.send(b"\0\0\0\r\n\r\n")
            await exchange.left()
            with pytest.raises(Cut):
                await client.answer()
        await at.until_counts(0, 0)


async def test_it_goes_on_after_a_bug_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(folder) as at:

        async def gone(client: Client) -> None:
            with pytest.raises(Cut):
                await client.answer()

        monkeypatch.setattr("orchestrator.api.exchange.STATUS_LINE", {})
        async with at.client() as client:
            await client.request(CHAT, BODY)
            exchange = await at.upstream.request()
            await exchange.head(200, (b"Content-Length", b"2"))
            await gone(client)
            await exchange.left()
        monkeypatch.undo()
        assert "could not be passed on" in caplog.text
        await at.until_counts(0, 0)
        async with at.client() as client:
            await client.request(CHAT, BODY)
            await (await at.upstream.request()).answer(200, b"{}")
            assert (await client.answer()).status == 200


@pytest.mark.usefixtures("way")
async def test_an_engine_that_ends_each_connection_at_once_is_a_502(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Found by chaos: it had ended between the connecting and the first write."""
    async with opened(folder) as at:
        at.upstream.path.unlink()

        async def shut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        async with await asyncio.start_unix_server(shut, at.upstream.path):
            for _ in range(20):
                async with at.client() as client:
                    await client.request(CHAT, BODY)
                    assert (await client.answer()).status == 502
        await at.until_counts(0, 0)
    assert "Traceback" not in caplog.text
