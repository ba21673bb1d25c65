"""Traces: spans of requests and of moves of models, as a collector gets them over HTTP, and what it costs when it does not take them."""

import asyncio
import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from orchestrator import settings
from orchestrator.api.ids import ids
from orchestrator.api.traces import Traces
from orchestrator.config_errors import load
from orchestrator.control.counts import Move
from orchestrator.errors import ConfigError
from tests.api.house import House, house
from tests.api.upstream import Exchange

DEADLINE_S = 20.0
QWEN = {"name": "org/qwen", "source": "org/qwen"}
ASLEEP = {"name": "org/qwen", "source": "org/qwen", "preload": False}
ASK = b'{"model": "org/qwen", "prompt": "x"}'
STREAM = b'{"model": "org/qwen", "prompt": "x", "stream": true}'
USED = b'{"usage":{"prompt_tokens":7,"completion_tokens":9}}'
TRACE = b"0af7651916cd43dd8448eb211c80319c"
CLIENTS = b"00-%b-b7ad6b7169203331-01" % TRACE
Attributes = dict[str, Any]


class Collector(ThreadingHTTPServer):
    """`takes`: it answers 200; else it refuses, for good."""

    daemon_threads = True

    def __init__(self) -> None:
        self.spans: queue.Queue[Span] = queue.Queue()
        self.resource: Attributes = {}
        self.takes = True
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    async def got(self, *names: str) -> dict[str, Span]:
        """Spans by name, as soon as these are there."""
        found: dict[str, Span] = {}
        while not set(names) <= found.keys():
            span = await asyncio.to_thread(self.spans.get, timeout=DEADLINE_S)
            found[span.name] = span
        return found


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path != "/v1/traces" or not self.server.takes:
            self.send_error(400, "not taken")
            return
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resource = told(sent.resource)
            for scope in sent.scope_spans:
                for span in scope.spans:
                    self.server.spans.put(span)

    def log_message(self, *said: object) -> None:
        pass


def told(of: Any) -> Attributes:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Collector() as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@pytest.fixture
def made() -> Iterator[Callable[[str], Traces]]:
    with contextlib.ExitStack() as stack:

        def make(url: str) -> Traces:
            one = Traces(url)
            stack.callback(one.close)
            return one

        yield make


Make = Callable[[str], Traces]


async def ask(at: House, body: bytes = ASK, *headers: str) -> Exchange:
    async with at.client() as client:
        await client.request("/v1/completions", body, *headers)
        there = await at.upstream.request()
        if body is STREAM:
            await there.stream()
            await there.chunk(b'data: {"choices":[{"text":"1"}]}\n\n')
            await there.chunk(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n\n')
            await there.end()
        else:
            await there.answer(200, USED)
        await client.answer()
        return there


# ---- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_request_is_a_span_in_its_clients_trace_and_its_engines_parent(
    folder: Path, collector: Collector, made: Make, way: str
) -> None:
    async with house(folder, QWEN, traces=made(collector.url)) as at:
        there = await ask(at, ASK, f"traceparent: {CLIENTS.decode()}", "Authorization: Bearer sk-secret", "X-Request-Id: mine")
        span = (await collector.got("POST /v1/completions"))["POST /v1/completions"]
        assert there.header(b"traceparent") == [b"00-%b-%b-01" % (TRACE, span.span_id.hex().encode())]
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE.decode(), "b7ad6b7169203331")
        assert (span.kind, span.status.code) == (Span.SPAN_KIND_SERVER, 0)
        assert told(span) == {
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "org/qwen",
            "gen_ai.usage.input_tokens": 7,
            "gen_ai.usage.output_tokens": 9,
            "orchestrator.request_id": "mine",
        }
        assert time.time_ns() - DEADLINE_S * 1e9 < span.start_time_unix_nano < span.end_time_unix_nano <= time.time_ns()
        assert collector.resource["service.name"] == "orchestrator"


@pytest.mark.asyncio
async def test_a_trace_that_begins_here_goes_on_in_the_engine_and_a_stream_tells_its_first_byte(
    folder: Path, collector: Collector, made: Make, way: str
) -> None:
    async with house(folder, QWEN, traces=made(collector.url)) as at:
        there = await ask(at, STREAM)
        span = (await collector.got("POST /v1/completions"))["POST /v1/completions"]
        assert there.header(b"traceparent") == [b"00-%b-%b-01" % (span.trace_id.hex().encode(), span.span_id.hex().encode())]
        assert span.parent_span_id == b""
        (event,) = span.events
        assert event.name == "first byte"
        assert span.start_time_unix_nano <= event.time_unix_nano <= span.end_time_unix_nano
        assert told(span)["gen_ai.usage.output_tokens"] == 9


@pytest.mark.asyncio
async def test_a_request_that_waits_for_a_start_tells_both(folder: Path, collector: Collector, made: Make) -> None:
    async with house(folder, ASLEEP, traces=made(collector.url)) as at:
        await ask(at)
        found = await collector.got("POST /v1/completions", "wait org/qwen", "start org/qwen")
        request, wait, start = found["POST /v1/completions"], found["wait org/qwen"], found["start org/qwen"]
        assert (wait.trace_id, wait.parent_span_id) == (request.trace_id, request.span_id)
        assert request.start_time_unix_nano <= wait.start_time_unix_nano <= start.end_time_unix_nano <= wait.end_time_unix_nano
        assert wait.end_time_unix_nano <= request.end_time_unix_nano
        assert (start.trace_id != request.trace_id, start.parent_span_id) == (True, b"")
        assert (told(start)["orchestrator.model"], bool(told(start)["orchestrator.reason"])) == ("org/qwen", True)


@pytest.mark.asyncio
async def test_errors_are_told_by_their_code(folder: Path, collector: Collector, made: Make, way: str) -> None:
    async with house(folder, QWEN, traces=made(collector.url)) as at:
        assert (await at.post("/v1/completions", b'{"model": "none"}')).status == 404
        span = (await collector.got("POST /v1/completions"))["POST /v1/completions"]
        assert (told(span)["error.type"], span.status.code, "gen_ai.request.model" in told(span)) == ("model_not_found", 0, False)
        async with at.client() as client:
            await client.request("/v1/completions", ASK)
            (await at.upstream.request()).die()
            assert (await client.answer()).status == 502
        span = (await collector.got("POST /v1/completions"))["POST /v1/completions"]
        assert (told(span)["http.response.status_code"], span.status.code) == (502, 2)
        assert told(span)["error.type"] == span.status.message != ""


@pytest.mark.asyncio
async def test_who_records_nothing_is_not_recorded_and_goes_on_as_it_came(folder: Path, collector: Collector, made: Make, way: str) -> None:
    unrecorded = CLIENTS[:-2] + b"00"
    async with house(folder, QWEN, traces=made(collector.url)) as at:
        there = await ask(at, ASK, f"traceparent: {unrecorded.decode()}")
        assert there.header(b"traceparent") == [unrecorded]
        await ask(at, STREAM)
        span = (await collector.got("POST /v1/completions"))["POST /v1/completions"]
        assert span.trace_id.hex() != TRACE.decode()  # spans come in their order: the first one was none
        assert len(span.events) == 1


@pytest.mark.asyncio
async def test_without_traces_the_engine_gets_the_clients_own(folder: Path, way: str) -> None:
    async with house(folder, QWEN) as at:
        assert (await ask(at, ASK, f"traceparent: {CLIENTS.decode()}")).header(b"traceparent") == [CLIENTS]


def test_a_share_of_the_traces_that_begin_here_is_recorded() -> None:
    assert not ids(None, None).spanned(0.0).recorded
    assert ids(None, None).spanned(1.0).recorded
    assert ids(None, CLIENTS).spanned(0.0).recorded  # it is its client's to say
    assert sum(ids(None, None).spanned(0.5).recorded for _ in range(1000)) in range(300, 700)


# ---- moves of models --------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_sleep_a_wake_and_a_start_that_fails_are_spans_with_their_reasons(folder: Path, collector: Collector, made: Make) -> None:
    async with house(folder, QWEN, traces=made(collector.url)) as at:
        await at.operate("POST", "/models/org%2Fqwen/sleep")
        await at.until_state("org/qwen", "asleep")
        await at.operate("POST", "/models/org%2Fqwen/wake")
        found = await collector.got("sleep org/qwen", "wake org/qwen")
        for name in ("sleep org/qwen", "wake org/qwen"):
            assert told(found[name])["orchestrator.reason"] != ""
            assert found[name].start_time_unix_nano <= found[name].end_time_unix_nano
    with contextlib.closing(made(collector.url)) as there:
        there.move(Move("m", "start", time.monotonic() - 3, time.monotonic(), "a request waits", "out of memory"))
        span = (await collector.got("start m"))["start m"]
        assert (span.status.code, span.status.message) == (2, "out of memory")
        assert 2.9e9 < span.end_time_unix_nano - span.start_time_unix_nano < 4e9


# ---- a collector that does not take them --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_collector_that_hangs_loses_spans_never_requests_and_holds_up_no_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        there = Traces("http://{}:{}".format(*hangs.getsockname()))
        async with house(folder, QWEN, traces=there) as at:
            await ask(at)
            taken, _ = await asyncio.to_thread(hangs.accept)  # the export has begun, and never ends
            with taken:
                for _ in range(20):
                    await ask(at)
                began = time.monotonic()
                there.close()
                assert time.monotonic() - began < 2.0


def test_that_a_collector_takes_nothing_is_said_once_and_that_it_does_again(
    collector: Collector, made: Make, caplog: pytest.LogCaptureFixture
) -> None:
    there = made(collector.url)

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "orchestrator.traces"]

    caplog.set_level("INFO", "orchestrator.traces")
    move = Move("m", "start", 0.0, 1.0, "a request waits")
    collector.takes = False
    for _ in range(3):
        there.move(move)
        assert there._provider.force_flush()
    (lost,) = said()
    assert lost.startswith(f"{collector.url}/v1/traces takes no traces, they are lost until it does: ")
    assert "not taken" in lost
    collector.takes = True
    there.move(move)
    assert collector.spans.get(timeout=DEADLINE_S).name == "start m"
    there.close()
    assert said()[1:] == [f"{collector.url}/v1/traces takes traces again"]


def test_what_is_left_at_the_end_is_sent(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    there = Traces(collector.url)
    there.move(Move("m", "wake", 0.0, 1.0, "a request waits"))
    there.close()
    assert collector.spans.get_nowait().name == "wake m"


# ---- the setting ------------------------------------------------------------------------------------------------------


def test_the_setting_without_the_extra_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_TRACES__ENDPOINT", "http://127.0.0.1:4318")
    assert load([], {}).traces.endpoint == "http://127.0.0.1:4318"
    for missing in ("opentelemetry.exporter.otlp.proto.nothing", "opentelemetry_that_is_not_there.exporter.otlp"):
        monkeypatch.setattr(settings, "OTLP", missing)
        with pytest.raises(ConfigError, match=r"pip install 'gpu-orchestrator\[otel\]'"):
            load([], {"ORCH_TRACES__ENDPOINT": "http://127.0.0.1:4318"})


@pytest.mark.parametrize("given", ["127.0.0.1:4318", "grpc://a:4317", "http://", "http://a/v1/traces", "http://u:p@a:1", "http://a b"])
def test_what_is_no_collector_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_TRACES__ENDPOINT", given)
    with pytest.raises(ConfigError, match=r"traces\.endpoint.*must be http://HOST:PORT"):
        load([], {"ORCH_TRACES__ENDPOINT": given})
