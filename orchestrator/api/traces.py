"""Requests and moves of models as OpenTelemetry spans, sent to a collector (traces.endpoint) by a thread of the SDK's.

A span is made when its end is known: until then a request carries only the id that its engine was told. What the collector does not take
in time is lost, and nobody waits for it. Names are those of OpenTelemetry's semantic conventions (HTTP, GenAI) where it has one.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from socket import gethostname

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context

from orchestrator import __version__
from orchestrator.api.fate import Fate
from orchestrator.control.counts import Move

log = logging.getLogger("orchestrator.traces")

CLOSE_S = 1.5  # what is left may take so long to be sent
WAITED_S = 0.001  # below that nobody waited
OPERATIONS = {  # gen_ai.operation.name, where it has one
    "POST /v1/chat/completions": "chat",
    "POST /v1/messages": "chat",
    "POST /v1/responses": "chat",
    "POST /v1/completions": "text_completion",
    "POST /v1/embeddings": "embeddings",
    "POST /v2/embed": "embeddings",
}
Value = str | int | float


class Traces:
    """`endpoint`: of the collector, without the path."""

    def __init__(self, endpoint: str) -> None:
        named = Resource({"service.name": "orchestrator", "service.version": __version__, "host.name": gethostname()})
        self._ids = _Ids()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # whether one is recorded was decided when its id was made
            resource=named.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(f"{endpoint.rstrip('/')}/v1/traces")))
        self._tracer = self._provider.get_tracer("orchestrator", __version__)

    def request(self, fate: Fate) -> None:
        """Of one that has ended."""
        if not fate.ids.recorded:
            return
        given = _context(fate.ids.traceparent)
        if fate.ids.parent:
            parent = _within(_context(fate.ids.parent))
        else:
            parent, self._ids.trace_id = Context(), given.trace_id
        self._ids.span_id = given.span_id
        span = self._begin(fate.route, parent, SpanKind.SERVER, fate.since, _of_request(fate))
        if fate.status >= 500:
            span.set_status(Status(StatusCode.ERROR, fate.code))
        if fate.first_at is not None:
            span.add_event("first byte", timestamp=_epoch_ns(fate.first_at))
        if fate.model and fate.wait_s >= WAITED_S:
            waiting = self._begin(f"wait {fate.model}", _within(given), SpanKind.INTERNAL, fate.since, {})
            waiting.end(_epoch_ns(fate.since + fate.wait_s))
        span.end(_epoch_ns(fate.ended_at))

    def move(self, move: Move) -> None:
        """Of a model: a trace of its own."""
        told: dict[str, Value] = {"orchestrator.model": move.model, "orchestrator.reason": move.why}
        span = self._begin(f"{move.kind} {move.model}", Context(), SpanKind.INTERNAL, move.began, told)
        if move.failed:
            span.set_status(Status(StatusCode.ERROR, move.failed))
        span.end(_epoch_ns(move.ended))

    def close(self) -> None:
        """What is left is sent, for CLOSE_S at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces end", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _begin(self, name: str, parent: Context, kind: SpanKind, at: float, told: Mapping[str, Value]) -> Span:
        span = self._tracer.start_span(name, parent, kind, told, start_time=_epoch_ns(at))
        assert isinstance(span, Span)
        return span


def _of_request(fate: Fate) -> dict[str, Value]:
    method, _, path = fate.route.partition(" ")
    told: dict[str, Value] = {
        "http.request.method": "GET" if method == "WS" else method,
        "http.route": path,
        "http.response.status_code": fate.status,
        "orchestrator.request_id": fate.ids.request_id.decode(),
    }
    if fate.model:
        told["gen_ai.request.model"] = fate.model
    if operation := OPERATIONS.get(fate.route):
        told["gen_ai.operation.name"] = operation
    if fate.usage is not None:
        told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"] = fate.usage.prompt_tokens, fate.usage.completion_tokens
    if fate.status >= 400:
        told["error.type"] = fate.code or str(fate.status)
    return told


def _context(traceparent: bytes) -> SpanContext:
    _, trace, span, flags = traceparent.split(b"-")
    return SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def _within(context: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(context), Context())


def _epoch_ns(at: float) -> int:
    """Of a time of time.monotonic's."""
    return time.time_ns() - round((time.monotonic() - at) * 1e9)


class _Ids(RandomIdGenerator):
    """Of a span whose ids were told before it was made, those; else random ones."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, 0
        return given or super().generate_trace_id()

    def generate_span_id(self) -> int:
        given, self.span_id = self.span_id, 0
        return given or super().generate_span_id()


class _Words(logging.Handler):
    """The last words of the SDK's, which says each failure of each batch."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


class _Exporter(OTLPSpanExporter):
    """Says once that the collector takes nothing, and once that it does again."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url, self._takes, self._words = url, True, _Words()
        theirs = logging.getLogger("opentelemetry")
        theirs.handlers, theirs.propagate = [self._words], False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        takes = result is SpanExportResult.SUCCESS
        if takes and not self._takes:
            log.info("%s takes traces again", self._url)
        elif self._takes and not takes:
            log.warning("%s takes no traces, they are lost until it does: %s", self._url, self._words.last or "no word on why")
        self._takes = takes
        return result
