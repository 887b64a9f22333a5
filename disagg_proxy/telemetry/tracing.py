"""OpenTelemetry spans, created from the record of a request when it has ended.

    POST /v1/completions    the complete request, a child of the client's span if it sent a traceparent
      queue or choose       waiting for admission, with or without queueing
      prefill               the prefill leg of the last attempt; its span id goes to prefill as traceparent
      decode                the decode leg of the last attempt, to the end of the response; its span id goes to decode

While a request runs it costs only the generation of ids. OpenTelemetry's own ``OTEL_*`` variables set the exporter, the
sampler and the service name. Imported only if ``TRACES`` is on, since the packages are optional.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from disagg_power.book import EnergyBook
from disagg_proxy import __version__
from disagg_proxy.http1.headers import Headers
from disagg_proxy.runtime.within import within
from disagg_proxy.telemetry.energy import estimate, rounded
from disagg_proxy.telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT = 2.0
"""Seconds that shutdown waits for the export of the last spans."""

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_NO_ERROR = frozenset({"ok", "client_error", "client_left", "turned_away"})
"""Outcomes without the span status ERROR: by OpenTelemetry's HTTP conventions only server faults get it."""

_Attributes = Mapping[str, str | int | float | None]


@dataclass(slots=True)
class TraceContext:
    """The W3C trace context of one request (https://www.w3.org/TR/trace-context/).

    Ids are chosen when the request arrives, so that engines get parent spans that are created only when it has ended.

    Attributes:
        trace_id: from the client's context, or a new one.
        parent_id: id of the client's span, 0 without one.
        request_id, prefill_id, decode_id: ids of the proxy's spans. All attempts share the last two.
        sampled: whether the spans are exported; passed to the engines.
        state: tracestate of the client.
    """

    trace_id: int
    parent_id: int
    request_id: int
    prefill_id: int
    decode_id: int
    sampled: bool
    state: str = ""

    @property
    def prefill_lines(self) -> bytes:
        """Header lines for prefill, with the prefill leg as the parent of its spans."""
        return self._lines(self.prefill_id)

    @property
    def decode_lines(self) -> bytes:
        """Header lines for decode, with the decode leg as the parent of its spans."""
        return self._lines(self.decode_id)

    def _lines(self, span_id: int) -> bytes:
        state = f"tracestate: {self.state}\r\n" if self.state else ""
        return f"traceparent: 00-{self.trace_id:032x}-{span_id:016x}-{self.sampled:02x}\r\n{state}".encode()


class SpanExporter:
    """Assigns the trace context of each request, and exports its spans when it has ended.

    Args:
        worker: the number of this worker, None for a single process.
        energy: for the estimated energy of a request.
    """

    def __init__(self, worker: int | None = None, energy: EnergyBook | None = None) -> None:
        self._energy = energy
        attributes = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or "disagg-proxy",
            "service.version": __version__,
        }
        if worker is not None:
            attributes["service.instance.id"] = f"worker-{worker}"
        self._resource = Resource.create(attributes)
        provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
        self._sampler, self._ids = provider.sampler, provider.id_generator
        self._scope = InstrumentationScope("disagg_proxy", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._processor = BatchSpanProcessor(OTLPSpanExporter())

    # -- when a request arrives

    def begin(self, record: RequestRecord, headers: Headers) -> Headers:
        """Set ``record.trace``. Returns ``headers`` without the client's context: each engine gets one of its own."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _CONTEXT_HEADERS}
        context = self._propagator.extract(carrier) if carrier else None
        parent = trace.get_current_span(context).get_span_context() if context else trace.INVALID_SPAN_CONTEXT
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampled = self._sampler.should_sample(context, trace_id, record.route, SpanKind.SERVER)
        record.trace = TraceContext(
            trace_id,
            parent.span_id if parent.is_valid else 0,
            self._ids.generate_span_id(),
            self._ids.generate_span_id(),
            self._ids.generate_span_id(),
            sampled.decision is Decision.RECORD_AND_SAMPLE,
            parent.trace_state.to_header() if parent.is_valid else "",
        )
        return [header for header in headers if header[0] not in _CONTEXT_HEADERS] if carrier else headers

    # -- when it has ended

    def take(self, record: RequestRecord) -> None:
        """Export the spans of a request that has ended. A sink of the request recorder."""
        if record.trace is not None and record.trace.sampled:
            for span in self._spans(record, record.trace):
                self._processor.on_end(span)

    def _spans(self, record: RequestRecord, ids: TraceContext) -> list[ReadableSpan]:
        started = record.arrived
        ended = started if record.ended is None else record.ended
        failed = record.outcome not in _NO_ERROR
        spans = [
            self._span(
                record, ids, f"POST {record.route}", ids.request_id, ids.parent_id, started, ended,
                SpanKind.SERVER, {**_request_attributes(record), **self._energy_attributes(record)}, failed=failed,
            )
        ]  # fmt: skip
        if record.ready is not None:
            until = ended if record.admitted is None else record.admitted
            spans.append(self._child(record, ids, "queue" if record.waited else "choose", record.ready, until))
        if record.prefill_sent is not None:
            until = ended if record.prefill_done is None else record.prefill_done
            spans.append(self._leg(record, ids, "prefill", ids.prefill_id, record.prefill, record.prefill_sent, until))
        if record.decode_sent is not None:
            spans.append(self._leg(record, ids, "decode", ids.decode_id, record.decode, record.decode_sent, ended))
        return spans

    def _energy_attributes(self, record: RequestRecord) -> _Attributes:
        joules = estimate(self._energy, record) if self._energy else None
        if joules is None:
            return {}
        return {"disagg.energy_j": rounded(joules[0]), "disagg.energy_idle_j": rounded(joules[1])}

    def _child(self, record: RequestRecord, ids: TraceContext, name: str, start: float, end: float) -> ReadableSpan:
        span_id = self._ids.generate_span_id()
        return self._span(record, ids, name, span_id, ids.request_id, start, end, SpanKind.INTERNAL, {})

    def _leg(
        self,
        record: RequestRecord,
        ids: TraceContext,
        name: str,
        span_id: int,
        instance: str | None,
        start: float,
        end: float,
    ) -> ReadableSpan:
        host, _, port = (instance or "").rpartition(":")
        attributes: _Attributes = {"server.address": host.strip("[]"), "server.port": int(port) if port else None}
        first = record.first_byte if name == "decode" else None
        return self._span(
            record, ids, name, span_id, ids.request_id, start, end, SpanKind.CLIENT, attributes, first=first
        )

    def _span(
        self,
        record: RequestRecord,
        ids: TraceContext,
        name: str,
        span_id: int,
        parent: int,
        start: float,
        end: float,
        kind: SpanKind,
        attributes: _Attributes,
        *,
        failed: bool = False,
        first: float | None = None,
    ) -> ReadableSpan:
        def context(of_span: int, remote: bool = False) -> SpanContext:
            flags = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(ids.trace_id, of_span, remote, flags, trace.TraceState.from_header([ids.state]))

        def unix(reading: float) -> int:
            return int((record.unix + (reading - record.arrived)) * 1e9)

        return ReadableSpan(
            name,
            context(span_id),
            parent=context(parent, parent == ids.parent_id) if parent else None,
            resource=self._resource,
            attributes={name: value for name, value in attributes.items() if value is not None},
            events=[] if first is None else [Event("first byte", timestamp=unix(first))],
            kind=kind,
            status=Status(StatusCode.ERROR, record.cause) if failed else Status(),
            start_time=unix(start),
            end_time=unix(end),
            instrumentation_scope=self._scope,
        )

    async def stop(self) -> None:
        """Export the remaining spans, within two seconds."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:
                log.debug("The last spans were exported after the event loop had closed")

        # An unreachable receiver delays shutdown by the time-out at most: the thread is a daemon.
        threading.Thread(target=end, name="last-spans", daemon=True).start()
        try:
            async with within(_FLUSH_TIMEOUT):
                await done.wait()
        except asyncio.TimeoutError:
            log.warning("Timed out exporting the last spans (OTEL_EXPORTER_OTLP_ENDPOINT)")


def _request_attributes(record: RequestRecord) -> _Attributes:
    """Span attributes, named by OpenTelemetry's conventions for HTTP and generative AI, else with ``disagg.``."""
    return {
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": None if record.outcome == "ok" else record.cause,
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": record.public_id,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.latency.time_to_first_token": record.ttft,
        "disagg.outcome": record.outcome,
        "disagg.client_id": record.client_id,
        "disagg.prefill": record.prefill,
        "disagg.decode": record.decode,
        "disagg.tries": record.tries,
        "disagg.stream_pieces": record.pieces if record.streamed else None,
    }
