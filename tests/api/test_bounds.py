"""What a client can make grow, and where it ends: connections, lines of the log, silent talks, tables by client, model or id.

Bounds of heads, bodies and slow requests: test_heads.py, test_patience.py, test_refusals.py. Of who waits: control/test_traffic_queue.py.
"""

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from orchestrator import logs
from orchestrator.api import logs as api_logs
from orchestrator.api import realtime
from orchestrator.api.bodies import Bodies
from orchestrator.api.responses import Made, Responses
from orchestrator.api.server import MOST_CONNECTIONS, OTHER_FILES, Server, most_connections
from orchestrator.control.keys import Keys
from orchestrator.control.queue import Place, Queue
from orchestrator.control.tally import Largest
from orchestrator.errors import BodyTooLarge, ModelUnavailable, RouteNotFound
from orchestrator.policy.units import KIB
from tests.api.house import House, house
from tests.api.rawclient import Client, Cut, connected
from tests.api.test_realtime import talking
from tests.support.eventually import eventually, turns

DEADLINE_S = 20.0
CHAT = "/v1/chat/completions"
ONE = {"name": "one", "source": "org/one"}

# ---- connections ----------------------------------------------------------------------------------------------------------------


class Slow:
    """An application that answers when the test says so."""

    def __init__(self) -> None:
        self.go, self.asked = asyncio.Event(), 0

    async def __call__(self, scope: dict, receive: object, send) -> None:  # type: ignore[no-untyped-def, type-arg]
        self.asked += 1
        if scope["path"] == "/slow":
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def served(app: Slow, most: int) -> AsyncIterator[tuple[Server, tuple[str, int]]]:
    with socket.create_server(("127.0.0.1", 0)) as public:
        server = Server(app, most=most)
        serving = asyncio.create_task(server.serve([public]))
        try:
            yield server, public.getsockname()
        finally:
            server.stop(at_once=True)
            await asyncio.wait_for(serving, DEADLINE_S)


async def ask(client: Client, path: str = "/") -> bytes:
    await client.request(path, method="GET")
    return (await client.answer()).body


@pytest.mark.asyncio
async def test_at_the_bound_who_comes_is_told_so_and_who_is_there_is_served() -> None:
    async with served(Slow(), most=4) as (server, address), contextlib.AsyncExitStack() as stack:
        there = [await stack.enter_async_context(connected(address)) for _ in range(4)]
        assert [await ask(client) for client in there] == [b"ok"] * 4
        async with connected(address) as late:
            answer = await late.answer()
            assert (answer.status, answer.header(b"retry-after"), answer.error["code"]) == (503, b"1", "busy")
            with pytest.raises(Cut):
                await late.head()
        assert len(server.server_state.connections) <= 4


@pytest.mark.asyncio
async def test_near_the_bound_the_longest_idle_go_and_those_with_a_request_stay() -> None:
    app = Slow()
    async with served(app, most=10) as (server, address), contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(connected(address)) for _ in range(2)]
        for client in busy:
            await client.request("/slow", method="GET")
        await eventually(lambda: app.asked == 2, "both are under way")
        hoard = [await stack.enter_async_context(connected(address)) for _ in range(7)]  # some say nothing, some have asked once
        for client in hoard[:3]:
            assert await ask(client) == b"ok"
        last = await stack.enter_async_context(connected(address))
        assert await ask(last) == b"ok"
        await eventually(lambda: len(server.server_state.connections) <= 7, "room was made")
        app.go.set()
        assert [(await client.answer()).body for client in busy] == [b"ok"] * 2
        assert await ask(last) == b"ok"  # the newest
        async with connected(address) as new:
            assert await ask(new) == b"ok"


def test_the_bound_leaves_half_of_the_files_for_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {1024: (1024 - OTHER_FILES) // 2, 65536: MOST_CONNECTIONS, 100: 64, -1: MOST_CONNECTIONS}
    for soft, wanted in limits.items():
        monkeypatch.setattr("resource.getrlimit", lambda what, soft=soft: (soft, soft))
        assert most_connections() == wanted


# ---- lines of the log -------------------------------------------------------------------------------------------------------------


def record(name: str, text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, text, args, None)


def test_of_what_clients_cause_few_lines_a_minute_are_written_and_the_rest_is_counted() -> None:
    clock = SimpleNamespace(now=0.0)
    few = logs.Few(lambda: clock.now)

    def written(count: int, text: str = "Invalid HTTP request received.", name: str = "uvicorn.error") -> list[str]:
        records = [record(name, text) for _ in range(count)]
        return [each.getMessage() for each in records if few.filter(each)]

    first = written(1000)
    assert len(first) == logs.MOST
    assert first[-1] == "Invalid HTTP request received. (more of these are counted, and left out for up to a minute)"
    assert written(1, "Exception in ASGI application\n") == ["Exception in ASGI application\n"]  # a flood hides no other kind
    assert len(written(1000, name="orchestrator")) == 1000  # what the daemon itself does is not a client's doing
    clock.now = logs.MINUTE_S
    assert written(2) == ["Invalid HTTP request received. (980 more of these were left out)", "Invalid HTTP request received."]
    clock.now = 2 * logs.MINUTE_S
    assert written(1) == ["Invalid HTTP request received."]


def test_kinds_of_lines_that_never_end_are_few_too() -> None:
    few = logs.Few(lambda: 0.0)
    assert sum(few.filter(record("asyncio", f"fault {number}")) for number in range(10_000)) <= logs.MOST_KINDS + logs.MOST
    assert len(few._seen) <= logs.MOST_KINDS + 1


@pytest.mark.asyncio
async def test_who_follows_a_log_that_begins_anew_goes_on_with_it(tmp_path: Path) -> None:
    log = tmp_path / "m.log"
    log.write_bytes(b"old\n" * 100)
    lines = api_logs.read(lambda: log, 1, follow=True)
    assert await anext(lines) == b"old\n"
    with log.open("r+b") as file:
        file.truncate(0)
    log.write_bytes(b"new\n")
    assert await asyncio.wait_for(anext(lines), DEADLINE_S) == b"new\n"
    with log.open("ab") as file:
        file.write(b"newer\n")
    assert await asyncio.wait_for(anext(lines), DEADLINE_S) == b"newer\n"
    await lines.aclose()  # type: ignore[attr-defined]


# ---- talks ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_talk_in_which_nobody_says_anything_ends_and_its_place_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "IDLE_S", 0.3)
    async with talking(folder) as (at, engine):
        at.door()
        host, port = at.address
        async with connect(f"ws://{host}:{port}/v1/realtime?model=one", proxy=None) as client:
            there = await engine.connection()
            await client.recv()
            began = time.monotonic()
            for number in range(6):  # either side keeps it
                await (client.send("x") if number % 2 else there.send("y"))
                await (there.recv() if number % 2 else client.recv())
                await asyncio.wait_for(_passes(0.1), DEADLINE_S)
            assert time.monotonic() - began > 0.5
            await at.until_counts(1, 0)
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(client.recv(), DEADLINE_S)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            assert "nothing was said" in closed.value.rcvd.reason
        await at.until_counts(0, 0)


@pytest.mark.asyncio
async def test_who_waits_for_its_model_is_not_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime, "IDLE_S", 0.1)
    async with talking(folder) as (at, engine):
        at.door(launch_id=None)
        host, port = at.address
        connecting = asyncio.ensure_future(connect(f"ws://{host}:{port}/v1/realtime?model=one", proxy=None).__aenter__())
        await at.until_counts(0, 1)
        await asyncio.wait_for(_passes(0.3), DEADLINE_S)
        at.door()
        client = await asyncio.wait_for(connecting, DEADLINE_S)
        assert json.loads(await client.recv())["type"] == "session.created"
        await engine.connection()
        await client.close()


async def _passes(seconds: float) -> None:
    """Time, where time is what is tested."""
    loop = asyncio.get_running_loop()
    passed = asyncio.Event()
    loop.call_later(seconds, passed.set)
    await passed.wait()


# ---- tables by client, model, id ----------------------------------------------------------------------------------------------------


def test_a_queue_keeps_nothing_of_clients_that_are_gone() -> None:
    queue: Queue[Place] = Queue()
    for number in range(3_000):  # each a client, a priority and a weight of its own
        place = Place(f"client {number}", number % 17 - 8, float(number), weight=1.0 + number % 5)
        queue.add(place)
        if number % 2:
            queue.remove(place)
        else:
            queue.serve(place, float(number))
    assert (len(queue), queue._levels, queue._shares._held, queue._shares._holders) == (0, {}, {}, {})


def test_the_largest_of_numbers_that_come_and_go_keeps_few_of_them() -> None:
    largest = Largest()
    largest.add(1 << 40)  # one that stays keeps the heap from being emptied at its top
    for number in range(100_000):
        largest.add(number)
        largest.remove(number)
    assert len(largest._count) == 1
    assert len(largest._heap) <= 2 * len(largest._count) + 64
    assert largest.value == 1 << 40


def test_of_responses_the_last_ones_are_remembered() -> None:
    responses = Responses(most=100)
    for number in range(1_000):
        responses.remember(f"resp_{number}", Made("m", "1"))
    assert len(responses._made) == 100
    assert responses.of("resp_999", "").model == "m"
    with pytest.raises(RouteNotFound):
        responses.of("resp_899", "")


@pytest.mark.asyncio
async def test_models_that_are_not_there_are_counted_nowhere(folder: Path) -> None:
    """Nor do clients that name themselves leave anything: what is kept of a request goes with it."""
    keys = Keys()
    async with house(folder, ONE, keys=keys) as at:
        secret = json.loads((await at.operate("POST", "/keys", b'{"name":"k"}')).body)["key"]
        for number in range(30):
            body = b'{"model":"made-up-%d"}' % number
            for path in ("/v1/completions", "/v1/responses", "/v1/embeddings"):
                answer = await at.post(path, body, f"Authorization: Bearer {secret}", f"X-Forwarded-For: 10.0.0.{number}")
                assert answer.status == 404
        await turns()
        assert keys.unwritten() == {}
        assert len(at.traffic.seen()) == 1
        assert json.loads((await at.operate("GET", "/keys/usage")).body)["usage"] == []


# ---- bodies ---------------------------------------------------------------------------------------------------------------------

LARGE = b'{"model":"one"' + b" " * (700 * KIB) + b"}"
SMALL = b'{"model":"one"}'


async def passes(at: House, client: Client, body: bytes) -> None:
    await client.request(CHAT, body)
    await (await at.upstream.request()).answer(200, b"{}")
    assert (await client.answer()).status == 200


@pytest.mark.asyncio
async def test_one_body_too_many_is_a_503_that_says_when_to_come_back(folder: Path) -> None:
    async with house(folder, ONE, max_bodies_bytes=1000 * KIB) as at, at.client() as first:
        await first.request(CHAT, LARGE)
        asked = await at.upstream.request()
        answer = await at.post(CHAT, LARGE)
        assert (answer.status, answer.error["code"], answer.header(b"retry-after")) == (503, "busy", b"2")
        assert "(requests.max_bodies)" in answer.error["message"]
        await asked.answer(200, b"{}")
        assert (await first.answer()).status == 200
        await passes(at, first, LARGE)  # there is room again


@pytest.mark.asyncio
async def test_large_bodies_keep_no_small_one_out(folder: Path) -> None:
    async with house(folder, ONE, max_bodies_bytes=1000 * KIB) as at, at.client() as large, at.client() as small:
        await large.request(CHAT, LARGE)
        await at.upstream.request()
        await passes(at, small, SMALL)


@pytest.mark.asyncio
async def test_a_body_that_is_declared_and_not_sent_holds_nothing(folder: Path) -> None:
    async with house(folder, ONE, max_bodies_bytes=1000 * KIB) as at, at.client() as silent, at.client() as other:
        await silent.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (1000 * KIB))
        await passes(at, other, LARGE)


@pytest.mark.asyncio
async def test_a_client_that_leaves_takes_its_body_along(folder: Path) -> None:
    async with house(folder, ONE, max_bodies_bytes=1000 * KIB) as at, at.client() as first, at.client() as other:
        await first.request(CHAT, LARGE)
        asked = await at.upstream.request()
        first.leave()
        await asked.left()
        await at.until_counts("one", 0, 0)
        await passes(at, other, LARGE)


@pytest.mark.asyncio
async def test_one_that_is_larger_than_all_may_be_is_taken_while_there_is_no_other(folder: Path) -> None:
    async with house(folder, ONE, max_bodies_bytes=100 * KIB) as at, at.client() as client:
        await passes(at, client, LARGE)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.lists(st.integers(0, 300), max_size=4), st.booleans(), st.booleans()), max_size=10))
def test_what_is_held_is_what_came_and_no_more_than_may_be(requests: list[tuple[list[int], bool, bool]]) -> None:
    """Of each its parts in KiB, whether it declares them, and whether its client leaves before the end."""
    bodies, held = Bodies(700 * KIB, 1500 * KIB), list[int]()
    with contextlib.ExitStack() as served:
        for parts, declares, leaves in requests:
            size, before = sum(parts) * KIB, sum(held)
            with contextlib.ExitStack() as this:
                hold = this.enter_context(bodies.hold(coming(parts, leaves)))
                try:
                    body = asyncio.run(hold.read({b"content-length": b"%d" % size} if declares else {}))
                except BodyTooLarge:
                    assert size > 700 * KIB
                except ModelUnavailable:
                    assert size > 64 * KIB
                    assert before > 1500 * KIB - size
                else:
                    assert body == (None if leaves else bytes(size))
                    if not leaves:
                        held.append(size if size > 64 * KIB else 0)
                        served.enter_context(this.pop_all())
            assert bodies.held_bytes == sum(held) <= 1500 * KIB
    assert bodies.held_bytes == 0


def coming(parts: list[int], leaves: bool) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": bytes(size * KIB), "more_body": True} for size in parts]
    messages.append({"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b""})

    async def receive() -> Message:
        return messages.pop(0)

    return receive


@pytest.mark.asyncio
async def test_a_name_of_megabytes_is_refused_at_once_and_in_few_words(folder: Path) -> None:
    """The nearest name that there is is looked for among short ones only: of this one it would take minutes."""
    name = b"a" * (1 << 22) + b"b" * (1 << 22)
    async with house(folder, ONE, max_body_bytes=64 << 20) as at:
        began = time.monotonic()
        answer = await at.post("/v1/completions", b'{"model":"%b"}' % name)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert time.monotonic() - began < 0.5
        assert len(answer.body) < 2_000
