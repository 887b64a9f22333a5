"""OpenTelemetry: the spans of a request, made from its record when it has ended, with the times that are in it.

    POST /v1/completions    the whole request, below the client's span where it sent a traceparent
      queue or choose       from asking for instances to having them, with or without a wait
      prefill               the prefill leg of the last try; prefill gets its id as traceparent
      decode                the decode leg of the last try, to the end of the answer; decode gets its id

So the way of a request only pays for ids. Where spans go, how many requests are sampled and what the service is called
is set by OpenTelemetry's own OTEL_* variables. Imported only when TRACES is on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from disagg_proxy import __version__
from disagg_proxy.http1.headers import Headers
from disagg_proxy.runtime.within import within
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.trace_context import TraceContext

log = logging.getLogger(__name__)

_END_WITHIN = 2.0
"""Seconds for the last spans."""

_CONTEXT = (b"traceparent", b"tracestate")
_WELL = frozenset({"ok", "client_error", "client_left", "turned_away"})
"""Outcomes that are no failure of a server's, as OpenTelemetry's conventions for HTTP have it."""

_Attributes = Mapping[str, str | int | float | None]


class SpanExporter:
    """What is told of each request at its beginning and at its end.

    Args:
        worker: number of this process, where there are several.
    """

    def __init__(self, worker: int | None = None) -> None:
        found = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "disagg-proxy", "service.version": __version__}
        if worker is not None:
            found["service.instance.id"] = f"worker-{worker}"
        self._resource = Resource.create(found)
        provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
        self._sampler, self._ids = provider.sampler, provider.id_generator
        self._scope = InstrumentationScope("disagg_proxy", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._processor = BatchSpanProcessor(OTLPSpanExporter())

    # -- the beginning

    def begin(self, record: RequestRecord, headers: Headers) -> Headers:
        """Choose the ids of a request; its headers without a context, which is told to the engines anew."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _CONTEXT}
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
        return [header for header in headers if header[0] not in _CONTEXT] if carrier else headers

    # -- the end

    def take(self, record: RequestRecord) -> None:
        """A request has ended."""
        if record.trace is not None and record.trace.sampled:
            for span in self._spans(record, record.trace):
                self._processor.on_end(span)

    def _spans(self, record: RequestRecord, ids: TraceContext) -> list[ReadableSpan]:
        started = record.arrived
        ended = started if record.ended is None else record.ended
        failed = record.outcome not in _WELL
        spans = [
            self._span(
                record, ids, f"POST {record.route}", ids.request_id, ids.parent_id, started, ended,
                SpanKind.SERVER, _of_request(record), failed=failed,
            )
        ]  # fmt: skip
        if record.ready is not None:
            until = ended if record.admitted is None else record.admitted
            spans.append(self._child(record, ids, "queue" if record.waited else "choose", record.ready, until))
        if record.prefill_asked is not None:
            until = ended if record.prefill_answered is None else record.prefill_answered
            spans.append(self._leg(record, ids, "prefill", ids.prefill_id, record.prefill, record.prefill_asked, until))
        if record.decode_asked is not None:
            spans.append(self._leg(record, ids, "decode", ids.decode_id, record.decode, record.decode_asked, ended))
        return spans

    def _child(self, record: RequestRecord, ids: TraceContext, name: str, start: float, end: float) -> ReadableSpan:
        own = self._ids.generate_span_id()
        return self._span(record, ids, name, own, ids.request_id, start, end, SpanKind.INTERNAL, {})

    def _leg(
        self,
        record: RequestRecord,
        ids: TraceContext,
        name: str,
        own: int,
        instance: str | None,
        start: float,
        end: float,
    ) -> ReadableSpan:
        host, _, port = (instance or "").rpartition(":")
        attributes: _Attributes = {"server.address": host.strip("[]"), "server.port": int(port) if port else None}
        first = record.first_byte if name == "decode" else None
        return self._span(record, ids, name, own, ids.request_id, start, end, SpanKind.CLIENT, attributes, first=first)

    def _span(
        self,
        record: RequestRecord,
        ids: TraceContext,
        name: str,
        own: int,
        parent: int,
        start: float,
        end: float,
        kind: SpanKind,
        attributes: _Attributes,
        *,
        failed: bool = False,
        first: float | None = None,
    ) -> ReadableSpan:
        def context(span_id: int, remote: bool = False) -> SpanContext:
            flags = TraceFlags(TraceFlags.SAMPLED)
            return SpanContext(ids.trace_id, span_id, remote, flags, trace.TraceState.from_header([ids.state]))

        def unix(moment: float) -> int:
            return int((record.unix + (moment - record.arrived)) * 1e9)

        return ReadableSpan(
            name,
            context(own),
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
        """Export what is left, for a moment at most."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:
                log.debug("The last spans were exported when the proxy had ended")

        # A receiver that is gone holds this up for as long as it may, but not the end of the process.
        threading.Thread(target=end, name="last-spans", daemon=True).start()
        try:
            async with within(_END_WITHIN):
                await done.wait()
        except asyncio.TimeoutError:
            log.warning("The last spans were not taken in time (OTEL_EXPORTER_OTLP_ENDPOINT)")


def _of_request(record: RequestRecord) -> _Attributes:
    """Names of OpenTelemetry's conventions for HTTP and for generative AI where they have one; ``disagg.`` else."""
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
