"""The realtime WebSocket: refused in HTTP, relayed both ways as it is, its lease held and freed, silence and slowness bounded."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, unix_serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from orchestrator.api import realtime
from orchestrator.control.counts import LEFT, UPGRADED
from orchestrator.control.keys import Keys
from orchestrator.errors import ModelUnavailable
from tests.api.doorway import Doorway, doorway
from tests.api.house import house
from tests.support.eventually import eventually

DEADLINE_S = 20.0
CREATED = '{"type":"session.created","id":"sess-engine"}'

pytestmark = pytest.mark.asyncio


@dataclass
class Engine:
    """Greets, then is in the test's hand: `arrived` has each connection."""

    greets: bool = True
    arrived: "asyncio.Queue[ServerConnection]" = field(default_factory=asyncio.Queue)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, connection: ServerConnection) -> None:
        if self.greets:
            await connection.send(CREATED)
        self.arrived.put_nowait(connection)
        await self.over.wait()

    async def connection(self) -> ServerConnection:
        return await asyncio.wait_for(self.arrived.get(), DEADLINE_S)


@contextlib.asynccontextmanager
async def talking(folder: Path) -> AsyncIterator[tuple[Doorway, Engine]]:
    async with doorway(folder) as at:
        at.upstream.path.unlink()
        engine = Engine()
        async with unix_serve(engine.serve, str(at.upstream.path), max_size=None):
            try:
                yield at, engine
            finally:
                engine.over.set()


def to(at: Doorway, query: str = "?model=one", **more: Any) -> connect:
    host, port = at.address
    return connect(f"ws://{host}:{port}/v1/realtime{query}", proxy=None, max_size=None, **more)


async def heard(connection: ClientConnection | ServerConnection) -> str | bytes:
    return await asyncio.wait_for(connection.recv(), DEADLINE_S)


async def closed(connection: ClientConnection | ServerConnection) -> tuple[int, str]:
    try:
        while True:
            await heard(connection)
    except ConnectionClosed:
        return connection.close_code or 0, connection.close_reason or ""


async def test_messages_go_both_ways_as_they_are(folder: Path) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            there = await engine.connection()
            assert await heard(client) == CREATED
            for message in ('{"type": "x",  "ž": "\\u0000"}', "not even JSON", b"\x00\xff", "", b"", "x" * 5_000_000):
                await client.send(message)
                assert await heard(there) == message
                await there.send(message)
                assert await heard(client) == message
            await at.until_counts(1, 0)
        assert await closed(there) == (1000, "")
        await at.until_counts(0, 0)


async def test_without_a_model_in_the_url_the_first_event_names_it(folder: Path) -> None:
    update = '{"type":"session.update","model":"one"}'
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at, "") as client:
            greeting = json.loads(await heard(client))  # before it has said anything, as clients expect
            assert greeting["type"] == "session.created"
            assert engine.arrived.empty()
            await client.send(update)
            there = await engine.connection()
            assert await heard(there) == update
            await there.send('{"type":"transcription.delta","delta":"a"}')
            assert json.loads(await heard(client))["type"] == "transcription.delta"  # the engine's own greeting did not come


async def test_ids_are_passed_on_and_keys_are_not(folder: Path) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        given = {"X-Request-Id": "r1", "Authorization": "Bearer sk-1", "X-Api-Key": "sk-1", "Cookie": "a=sk-1"}
        protocols = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.sk-1")]
        async with to(at, additional_headers=given, subprotocols=protocols) as client:
            assert client.subprotocol == "realtime"
            assert client.response is not None
            assert client.response.headers["x-request-id"] == "r1"
            there = await engine.connection()
            assert there.request is not None
            assert there.request.headers["x-request-id"] == "r1"
            assert "traceparent" in there.request.headers
            assert not [value for _, value in there.request.headers.raw_items() if "sk-1" in value]


async def test_a_browsers_key_is_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes | None] = []
    real = Keys.caller

    def caller(self: Keys, headers: Any, address: str) -> Any:
        seen.append(headers.get(b"authorization"))
        return real(self, headers, address)

    monkeypatch.setattr(Keys, "caller", caller)
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at, subprotocols=[Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.sk-1")]):
            await engine.connection()
        assert seen == [b"Bearer sk-1"]


async def refused(connecting: connect) -> tuple[int, dict[str, Any], Any]:
    with pytest.raises(InvalidStatus) as status:
        async with connecting:
            pass
    answer = status.value.response
    return answer.status_code, json.loads(answer.body or b"")["error"], answer.headers


async def test_what_is_refused_before_it_begins_is_refused_in_http(folder: Path) -> None:
    async with house(folder, {"name": "one", "source": "org/one", "max_concurrency": 1, "max_queue": 0}) as at:
        host, port = at.users
        url = f"ws://{host}:{port}"
        status, error, headers = await refused(connect(f"{url}/v1/realtime?model=two", proxy=None))
        assert (status, error["code"]) == (404, "model_not_found")
        assert headers["x-request-id"]
        assert (await refused(connect(f"{url}/v1/realtime?model=one", proxy=None, additional_headers={"X-Priority": "99"})))[0] == 400
        for path in ("/sleep", "/v1/completions", "/v1/realtime/", "/v1%2frealtime", "//v1/realtime", "/"):
            status, error, _ = await refused(connect(f"{url}{path}?model=one", proxy=None))
            assert (status, error["code"]) == (404, "route_not_found"), path
        async with at.client() as client:
            await client.request("/v1/completions", b'{"model":"one"}')
            exchange = await at.upstream.request()
            status, error, headers = await refused(connect(f"{url}/v1/realtime?model=one", proxy=None))
            assert (status, error["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
            await exchange.answer(200, b"{}")
            await client.answer()
        connecting = asyncio.ensure_future(refused(connect(f"{url}/v1/realtime?model=one", proxy=None)))
        await (await at.upstream.request()).answer(404, b"{}")  # of a model that transcribes nothing
        status, error, _ = await connecting
        assert (status, error["code"], error["param"]) == (404, "route_not_found", "model")
        await at.until_counts("one", 0, 0)


@pytest.mark.parametrize("first", ["{}", "not JSON", '{"type":"session.update"}', '{"type":"other","model":"one"}', b"\x00"])
async def test_a_first_event_without_a_model_is_told_so_and_closed(folder: Path, first: str | bytes) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at, "") as client:
            await heard(client)
            await client.send(first)
            error = json.loads(await heard(client))
            assert (error["type"], error["code"]) == ("error", "missing_required_parameter")
            assert await closed(client) == (1008, "missing_required_parameter")
        assert engine.arrived.empty()


async def test_errors_after_the_greeting_are_events(folder: Path) -> None:
    async with talking(folder) as (at, _):
        at.door(error=ModelUnavailable("stopped", code="model_stopped"), launch_id=None)
        async with to(at, "") as client:
            await heard(client)
            await client.send('{"type":"session.update","model":"one"}')
            assert json.loads(await heard(client)) == {"type": "error", "error": "stopped", "code": "model_stopped"}
            assert await closed(client) == (1013, "model_stopped")


@pytest.mark.parametrize("query", ["", "?model=one"])
async def test_who_never_speaks_is_closed_and_its_place_is_free(folder: Path, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "SILENCE_S", 0.2)
    async with talking(folder) as (at, _):
        at.door()
        async with to(at, query) as client:
            assert (await closed(client))[0] == 1008
            await at.until_counts(0, 0)


async def test_who_has_spoken_may_be_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "SILENCE_S", 0.2)
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            await client.send("x")
            there = await engine.connection()
            assert await heard(there) == "x"
            async with to(at) as other:
                assert (await closed(other))[0] == 1008  # as long as that
            await there.send("y")
            assert [await heard(client) for _ in range(2)] == [CREATED, "y"]


@pytest.mark.parametrize(("code", "reason"), [(1000, "bye"), (3000, ""), (4242, "žluť")])
async def test_close_codes_are_passed_on_from_the_client(folder: Path, code: int, reason: str) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            there = await engine.connection()
            await client.close(code, reason)
            assert await closed(there) == (code, reason)
        await at.until_counts(0, 0)


@pytest.mark.parametrize(("code", "reason"), [(1000, "done"), (1011, "fault"), (4242, "žluť")])
async def test_and_from_the_engine(folder: Path, code: int, reason: str) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            there = await engine.connection()
            await there.close(code, reason)
            assert await closed(client) == (code, reason)
            await at.until_counts(0, 0)


async def test_an_engine_that_dies_is_an_event_and_a_1011(folder: Path) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            assert await heard(client) == CREATED
            (await engine.connection()).transport.abort()
            assert json.loads(await heard(client))["code"] == "engine_error"
            assert (await closed(client))[0] == 1011
            await at.until_counts(0, 0)


async def test_a_client_that_vanishes_frees_its_place(folder: Path) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at) as client:
            there = await engine.connection()
            await at.until_counts(1, 0)
            client.transport.abort()
            assert (await closed(there))[0] == 1000
            await at.until_counts(0, 0)


@pytest.mark.parametrize("query", ["", "?model=one"])
async def test_it_waits_for_its_model_and_may_leave_meanwhile(folder: Path, query: str) -> None:
    update = '{"type":"session.update","model":"one"}'

    async def come(client: ClientConnection) -> None:
        await heard(client)
        await client.send(update)

    async with talking(folder) as (at, engine):
        at.door(None, phase="starting", timed=False)
        connecting = asyncio.ensure_future(to(at, query).__aenter__())
        if not query:
            await come(await connecting)
        await at.until_counts(0, 1)
        if query:
            connecting.cancel()
        else:
            (await connecting).transport.abort()
        await at.until_counts(0, 0)
        connecting = asyncio.ensure_future(to(at, query).__aenter__())
        if not query:
            await come(await connecting)
        await at.until_counts(0, 1)
        at.door()
        there = await engine.connection()
        client = await connecting
        if query:
            await come(client)
        assert await heard(there) == update
        await client.close()
        await at.until_counts(0, 0)


async def test_what_is_said_while_it_waits_is_kept_in_order(folder: Path) -> None:
    async with talking(folder) as (at, engine):
        at.door(None, phase="starting", timed=False)
        async with to(at, "") as client:
            await heard(client)
            said = ['{"type":"session.update","model":"one"}', *(f"m{n}" for n in range(200))]
            sending = asyncio.ensure_future(asyncio.gather(*(client.send(message) for message in said)))
            await at.until_counts(0, 1)
            at.door()
            there = await engine.connection()
            assert [await heard(there) for _ in said] == said
            await sending


@pytest.mark.parametrize("reader", ["client", "engine"])
async def test_who_takes_slowly_holds_the_other_side_back(folder: Path, reader: str) -> None:
    async with talking(folder) as (at, engine):
        at.door()
        async with to(at, max_queue=1) as client:
            there = await engine.connection()
            await heard(client)
            source = there if reader == "client" else client
            slow = client if reader == "client" else there
            if reader == "client":
                await client.send("hello")
                await heard(there)
            sent = 0

            async def pour() -> None:
                nonlocal sent
                for _ in range(256):
                    await source.send(b"x" * (1 << 20))
                    sent += 1

            slow.transport.pause_reading()
            pouring = asyncio.ensure_future(pour())
            before = -1
            while before != sent:
                before = sent
                await asyncio.wait({pouring}, timeout=0.5)
            assert sent < 64, "64 MiB were taken although nobody read them"
            slow.transport.resume_reading()
            for _ in range(256):
                assert len(await heard(slow)) == 1 << 20
            await pouring


async def test_a_message_that_is_too_large_closes_it(folder: Path) -> None:
    async with talking(folder) as (at, _):
        at.door()
        async with to(at) as client:
            with contextlib.suppress(ConnectionClosed):
                await client.send(b"x" * ((16 << 20) + 1))
            assert (await closed(client))[0] == 1009
            await at.until_counts(0, 0)


async def test_each_is_counted_once_at_its_end_by_what_became_of_it(folder: Path) -> None:
    async with talking(folder) as (at, engine):

        async def counted(statuses: dict[int, int]) -> None:
            await eventually(lambda: at.counts.of("one").statuses == statuses, f"{statuses}; {at.counts.models}")

        at.door()
        async with to(at) as client:
            there = await engine.connection()
            await there.send('{"usage":{"prompt_tokens":7,"completion_tokens":3}}')
            await heard(client)
            await heard(client)
            assert at.counts.of("one").statuses == {}
        await counted({UPGRADED: 1})
        found = at.counts.of("one")
        assert (found.prompt_tokens, found.completion_tokens, sum(found.answers.counts)) == (7, 3, 0)
        async with to(at):
            (await engine.connection()).transport.abort()
            await counted({UPGRADED: 1, 502: 1})
        at.door(None, error=ModelUnavailable("stopped", code="model_stopped"))
        assert (await refused(to(at)))[0] == 503
        await counted({UPGRADED: 1, 502: 1, 503: 1})
        assert found.errors["model_stopped"] == 1
        async with to(at, "") as client:  # it leaves before it has named a model
            await heard(client)
        await eventually(lambda: at.counts.of("").statuses == {LEFT: 1}, f"it left; {at.counts.models}")


async def test_what_an_engine_says_that_it_took_is_added_up() -> None:
    used = None
    for message in ('{"type":"transcription.delta","delta":"a"}', b'"usage"', '{"text":"\\"usage\\": {\\"prompt_tokens\\": 9}"}'):
        used = realtime._used(used, message)
    assert used is None
    for _ in range(2):
        told = '{"type":"transcription.done","text":"a","usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
        used = realtime._used(used, told)
    assert used == (14, 6)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX: " + b"x" * 8200 + b"\r\n\r\n", 431),
        (b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\n\r\n", 404),
    ],
)
async def test_a_handshake_that_is_none_is_refused(folder: Path, head: bytes, status: int) -> None:
    async with talking(folder) as (at, _), at.client() as client:
        await client.send(head)
        assert (await client.head()).status == status
