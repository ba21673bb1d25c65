"""How long a request says it waits, how urgent it says it is, and who it says it is."""

import asyncio
from pathlib import Path

import openai
import pytest

from orchestrator.api.asking import address_of, read
from orchestrator.api.routes import TABLE
from orchestrator.control.keys import Caller, Keys
from orchestrator.errors import BadRequest
from tests.api.doorway import Doorway, doorway
from tests.api.rawclient import Client

CHAT = "/v1/chat/completions"
BODY = b'{"model":"one"}'
STREAM = b'{"model":"one","stream":true}'
LOCAL = ("127.0.0.1", 5)


def patience(*headers: tuple[bytes, bytes], body: bytes = BODY) -> float | None:
    return read(TABLE[0], dict(headers), body, Caller("")).asker.patience_s


@pytest.mark.parametrize("name", [b"x-stainless-read-timeout", b"x-stainless-timeout", b"x-request-timeout"])
def test_a_timeout_counts_less_a_moment_in_which_the_client_hears_of_it(name: bytes) -> None:
    assert patience((name, b"600")) == 599
    assert patience((name, b"600.0")) == 599
    assert patience((name, b"5")) == 4.5
    assert patience((name, b"0.5")) == 0.45


def test_the_shortest_of_several_counts() -> None:
    given = [(b"x-stainless-read-timeout", b"600"), (b"x-stainless-timeout", b"60"), (b"x-request-timeout", b"100")]
    assert patience(*given) == 59
    assert patience(*given, (b"x-request-timeout", b"20")) == 19
    assert patience() is None


@pytest.mark.parametrize("none", [b"None", b"NOT_GIVEN", b"inf", b"nan", b"0", b"0.0", b"-1", b"", b"1e3", b"9" * 30, b"\xb2"])
def test_an_sdk_that_has_no_timeout_waits_as_long_as_we_let_it(none: bytes) -> None:
    assert patience((b"x-stainless-timeout", none)) is None
    assert patience((b"x-stainless-timeout", none), (b"x-stainless-read-timeout", b"60")) == 59


def test_who_is_told_what_goes_on_is_not_in_silence() -> None:
    progress = (b"x-progress", b"sse")
    assert patience(progress, (b"x-stainless-read-timeout", b"20"), (b"x-stainless-timeout", b"20"), body=STREAM) is None
    assert patience(progress, (b"x-stainless-read-timeout", b"20"), body=BODY) == 19  # it is told nothing
    assert patience(progress, (b"x-stainless-read-timeout", b"6"), body=STREAM) == pytest.approx(5.4)  # shorter than two pauses
    assert patience(progress, (b"x-request-timeout", b"20"), body=STREAM) == 19  # the whole, not a silence


def client(address: str | None, *headers: tuple[bytes, bytes]) -> str:
    given = dict(headers)
    return Keys().caller(given, address_of({"client": (address, 5) if address else None}, given)).client


def test_a_client_is_its_address() -> None:
    key = (b"authorization", b"Bearer sk-one")
    assert client("10.0.0.7") == client("10.0.0.7", key) == "10.0.0.7"
    assert client("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", None])
def test_on_this_machine_a_client_is_its_credentials(address: str | None) -> None:
    one, two = client(address, (b"authorization", b"Bearer sk-one")), client(address, (b"authorization", b"Bearer sk-two"))
    assert len({one, two, client(address)}) == 3
    assert "sk-one" not in one


WRONG = [
    ("X-Priority", ["9", "-9", "1.5", "high", "", "1_0", "10", "8 8"], "an integer from -8 to 8"),
    ("X-Request-Timeout", ["0", "-1", "soon", "30s", "1e3", "inf", ""], "a number of seconds above 0"),
    ("X-Progress", ["json", "true", ""], "`sse`"),
]


@pytest.mark.parametrize(("name", "values", "wanted"), WRONG, ids=[name for name, _, _ in WRONG])
@pytest.mark.asyncio
async def test_a_header_for_us_that_is_wrong_is_a_400_with_the_mend(folder: Path, name: str, values: list[str], wanted: str) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        for value in values:
            await client.request(CHAT, BODY, f"{name}: {value}")
            answer = await client.answer()
            assert (answer.status, answer.error["param"]) == (400, name), value
            assert answer.error["message"] == f"The header {name} is {value!r}: it must be {wanted}, or left out."
        assert at.upstream.untouched()


@pytest.mark.parametrize("value", [b"-8", b"8", b"+3", b"-0"])
def test_priorities_that_are_right(value: bytes) -> None:
    with_it = read(TABLE[0], {b"x-priority": value}, BODY, Caller(""))
    assert with_it.asker.priority == int(value)
    with pytest.raises(BadRequest):
        read(TABLE[0], {b"x-priority": value + b"0"}, BODY, Caller(""))


@pytest.mark.asyncio
async def test_what_is_for_us_goes_no_further(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door()
        await client.request(CHAT, BODY, "X-Priority: 3", "X-Progress: SSE", "X-Request-Timeout: 9", "x-stainless-timeout: 7")
        exchange = await at.upstream.request()
        assert not {key.lower() for key, _ in exchange.headers} & {b"x-priority", b"x-progress", b"x-request-timeout"}
        assert exchange.header(b"x-stainless-timeout") == [b"7"]
        await exchange.answer(200, b"{}")
        assert (await client.answer()).status == 200


async def served(at: Doorway) -> list[bytes]:
    """Who reaches the engine, one by one."""
    order = list[bytes]()
    waiting = at.traffic.seen()["one"].waiting
    at.door(max_concurrency=1)
    for _ in range(waiting):
        exchange = await at.upstream.request()
        order += exchange.header(b"x-who")
        await exchange.answer(200, b"{}")
    await at.until_counts(0, 0)
    return order


async def enqueue(at: Doorway, client: Client, who: str, *headers: str) -> None:
    waiting = at.traffic.seen()["one"].waiting
    await client.request(CHAT, BODY, f"X-Who: {who}", *headers)
    await at.until_counts(0, waiting + 1)


@pytest.mark.asyncio
async def test_keys_of_one_machine_are_served_in_turn_and_priorities_first(folder: Path) -> None:
    wanted = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("a4", "a"), ("b2", "b")]
    async with doorway(folder) as at:
        at.door(None)
        async with at.client() as c1, at.client() as c2, at.client() as c3, at.client() as c4, at.client() as c5, at.client() as c6:
            for client, (who, key) in zip((c1, c2, c3, c4, c5, c6), wanted, strict=True):
                urgent = ["X-Priority: 1"] if who == "a4" else []
                await enqueue(at, client, who, f"Authorization: Bearer {key}", *urgent)
            assert await served(at) == [b"a4", b"a1", b"b1", b"a2", b"b2", b"a3"]


@pytest.mark.asyncio
async def test_who_would_wait_in_vain_is_told_when_to_come_back(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door(None, retry_after_s=40.2)
        await client.request(CHAT, BODY, "X-Request-Timeout: 30")
        answer = await client.answer()
        assert (answer.status, answer.error["code"], answer.header(b"retry-after")) == (503, "not_ready_in_time", b"41")
        assert at.traffic.seen()["one"].last_used is not None  # and it is started


@pytest.mark.asyncio
async def test_waiting_longer_than_it_said_is_a_503_that_says_when_to_come_back(folder: Path) -> None:
    async with doorway(folder) as at, at.client() as client:
        at.door(None, retry_after_s=0)
        await client.request(CHAT, BODY, "X-Request-Timeout: 0.1")
        await at.until_counts(0, 1)
        at.door(None, retry_after_s=12)
        answer = await client.answer()
        assert (answer.status, answer.error["code"], answer.header(b"retry-after")) == (503, "timeout", b"12")
        assert "its own timeout" in answer.error["message"]
        await at.until_counts(0, 0)


def sdk(at: Doorway, **options: object) -> openai.AsyncOpenAI:
    url = f"http://{at.address[0]}:{at.address[1]}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="sk", max_retries=0, **options)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_the_openai_sdk_says_its_timeout_and_hears_in_time(folder: Path) -> None:
    async with doorway(folder) as at, sdk(at, timeout=30.0) as client:
        at.door(None, retry_after_s=29.5)
        with pytest.raises(openai.InternalServerError) as error:
            await client.completions.create(model="one", prompt="x")
        assert (error.value.code, error.value.response.headers["retry-after"]) == ("not_ready_in_time", "30")
        at.door(None, retry_after_s=0)
        with pytest.raises(openai.InternalServerError) as late:  # not APITimeoutError: it is told before it gives up
            await client.completions.create(model="one", prompt="x", timeout=0.5)
        assert (late.value.status_code, late.value.code) == (503, "timeout")


@pytest.mark.asyncio
async def test_the_openai_sdk_reads_a_stream_that_begins_with_comments(folder: Path) -> None:
    async with doorway(folder) as at, sdk(at) as client:
        at.door(None, phase="starting")
        asked = asyncio.ensure_future(client.completions.create(model="one", prompt="x", stream=True, extra_headers={"X-Progress": "sse"}))
        stream = await asked  # the head is there before the engine is
        await at.until_counts(0, 1)
        at.door()
        exchange = await at.upstream.request()
        await exchange.stream()
        text = b'{"id":"1","object":"text_completion","created":1,"model":"one","choices":[{"index":0,"text":"hi","finish_reason":null}]}'
        await exchange.chunk(b"data: " + text + b"\n\ndata: [DONE]\n\n")
        await exchange.end()
        assert [chunk.choices[0].text async for chunk in stream] == ["hi"]


@pytest.mark.asyncio
async def test_the_openai_sdk_raises_what_comes_as_an_error_event(folder: Path) -> None:
    async with doorway(folder) as at, sdk(at) as client:
        at.door(None, phase="starting")
        stream = await client.completions.create(model="one", prompt="x", stream=True, extra_headers={"X-Progress": "sse"})
        await at.until_counts(0, 1)
        at.traffic.publish({})
        with pytest.raises(openai.APIError, match="removed"):
            [chunk async for chunk in stream]


@pytest.mark.asyncio
async def test_who_waits_when_the_daemon_ends_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by chaos: the connection was cut, without a word."""
    monkeypatch.setattr("orchestrator.api.server.STOP_S", 0)
    async with doorway(folder) as at:
        at.door(None)
        async with at.client() as client:
            await client.request("/v1/completions", b'{"model":"one"}')
            await at.until_counts(0, 1)
            at.server.stop()
            answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        await at.until_counts(0, 0)
