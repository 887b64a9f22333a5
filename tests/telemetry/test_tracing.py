"""Traces, as a real OTLP receiver gets them over HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from disagg_proxy.config import ConfigError, load
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.tracing import SpanExporter
from tests.conftest import running_proxy, soon
from tests.e2e.together import OWN
from tests.simulated import REQUESTS, Machine
from tests.telemetry.metrics import ROOT

PATH = "/v1/completions"
ASK = REQUESTS[PATH]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=x"}


class Receiver:
    """Keeps all spans, and what service they are of."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self._came = asyncio.Event()

    async def take(self, request: web.Request) -> web.Response:
        assert request.path == "/v1/traces" and request.content_type == "application/x-protobuf"
        message = ExportTraceServiceRequest.FromString(await request.read())
        for group in message.resource_spans:
            self.resource = {one.key: one.value.string_value for one in group.resource.attributes}
            for scope in group.scope_spans:
                assert scope.scope.name == "disagg_proxy"
                self.spans += scope.spans
        self._came.set()
        return web.Response(content_type="application/x-protobuf")

    async def until(self, count: int) -> dict[str, Span]:
        """Spans by name, once there are so many."""

        async def all_came() -> None:
            while len(self.spans) < count:
                self._came.clear()
                await self._came.wait()

        await soon(all_came())
        return {span.name: span for span in self.spans}


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    yield receiver
    await runner.cleanup()


@pytest.fixture
async def traced(receiver: Receiver, http, request) -> AsyncIterator[Machine]:
    mark = request.node.get_closest_marker("settings")
    async with running_proxy(traces=True, **(mark.kwargs if mark else {})) as proxy, AsyncExitStack() as stack:
        yield Machine(proxy, stack, http)


def of(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def test_a_request_is_one_trace_with_its_legs_below(traced, receiver) -> None:
    pair = await traced.pair()
    await traced.stream(PATH, {**ASK, "max_tokens": 20}, **CONTEXT, **{"X-Request-Id": "mine"})
    spans = await receiver.until(4)
    assert set(spans) == {f"POST {PATH}", "choose", "prefill", "decode"}
    whole = spans[f"POST {PATH}"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert whole.parent_span_id.hex() == CALLER and whole.trace_state == "vendor=x"
    assert whole.kind == Span.SPAN_KIND_SERVER and whole.status.code == Status.STATUS_CODE_UNSET
    for name in ("choose", "prefill", "decode"):
        child = spans[name]
        assert child.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= child.start_time_unix_nano < child.end_time_unix_nano
        assert child.end_time_unix_nano <= whole.end_time_unix_nano
    assert spans["prefill"].end_time_unix_nano <= spans["decode"].start_time_unix_nano
    assert [event.name for event in spans["decode"].events] == ["first byte"]
    for engine in pair:
        (got,) = [r.headers for r in engine.received(PATH)]
        role = engine.config.role
        assert got["traceparent"] == f"00-{TRACE}-{spans[role].span_id.hex()}-01" and got["tracestate"] == "vendor=x"
        assert f"{of(spans[role])['server.address']}:{of(spans[role])['server.port']}" == engine.http_address
    found = of(whole)
    assert found["http.response.status_code"] == 200 and found["gen_ai.request.model"] == "sim-model"
    assert found["disagg.outcome"] == "ok" and found["disagg.client_id"] == "mine"
    assert receiver.resource["service.name"] == "disagg-proxy"


@pytest.mark.parametrize("stream", [False, True])
async def test_both_legs_at_once(traced, receiver, stream: bool) -> None:
    pair = await traced.pair(**OWN)
    await traced.send(PATH, {**ASK, "stream": stream})
    spans = await receiver.until(4)
    assert not spans[f"POST {PATH}"].parent_span_id
    for engine in pair:
        (got,) = [r.headers for r in engine.received(PATH)]
        span = spans[engine.config.role]
        assert got["traceparent"] == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"


async def test_a_request_that_fails(traced, receiver) -> None:
    await traced.post(PATH, {**ASK, "prompt": "secret"})
    await traced.post(PATH, {"prompt": 1, "model": 2})
    await receiver.until(3)
    ends = {(of(s)["disagg.outcome"], s.status.code, s.status.message) for s in receiver.spans if "POST" in s.name}
    assert ends == {
        ("no_pair", Status.STATUS_CODE_ERROR, "no_pair"), ("client_error", Status.STATUS_CODE_UNSET, ""),
    }  # fmt: skip
    assert b"secret" not in b"".join(span.SerializeToString() for span in receiver.spans)


@pytest.mark.settings(decode_max_in_flight=1)
async def test_a_request_that_waits(traced, receiver) -> None:
    _, decode = await traced.pair()
    with decode.faults.held("answer"):
        first = asyncio.ensure_future(traced.stream(PATH, ASK))
        await decode.wait_until(lambda state: state["held_at"] == "answer")
        second = asyncio.ensure_future(traced.stream(PATH, ASK))
        while not traced.proxy.services.admission_queue.waiting:
            await asyncio.sleep(0)
    await soon(asyncio.gather(first, second))
    names = sorted(span.name for span in (await receiver.until(8), receiver.spans)[1])
    assert names == sorted(["choose", "queue", *["prefill", "decode", f"POST {PATH}"] * 2])


async def test_what_the_caller_does_not_sample_is_not_exported_and_the_engines_know(traced, receiver) -> None:
    pair = await traced.pair()
    await traced.stream(PATH, ASK, traceparent=f"00-{TRACE}-{CALLER}-00")
    await traced.stream(PATH, ASK, traceparent="no context at all")
    spans = await receiver.until(4)
    assert TRACE not in {span.trace_id.hex() for span in receiver.spans} and len(spans) == 4
    first, second = (r.headers["traceparent"] for r in pair[0].received(PATH))
    assert first.startswith(f"00-{TRACE}-") and first.endswith("-00") and CALLER not in first
    assert second.endswith("-01") and TRACE not in second


async def test_sampling_and_names_are_opentelemetrys_own(receiver, http, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    traces = SpanExporter()
    record = RequestRecorder.standalone().open(PATH, None)
    traces.begin(record, [])
    assert record.trace is not None and not record.trace.sampled
    await traces.stop()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    traces = SpanExporter(worker=1)
    record = RequestRecorder.standalone().open(PATH, None)
    traces.begin(record, [])
    record.end()
    traces.take(record)
    await traces.stop()
    assert [span.name for span in receiver.spans] == [f"POST {PATH}"], "exported at the end"
    assert receiver.resource["service.name"] == "mine" and receiver.resource["deployment.environment"] == "test"
    assert receiver.resource["service.instance.id"] == "worker-1"


async def test_a_receiver_that_is_not_there_holds_up_neither_requests_nor_the_end(http, monkeypatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("disagg_proxy.telemetry.tracing._FLUSH_TIMEOUT", 0.3)
    async with running_proxy(traces=True) as proxy, AsyncExitStack() as stack:
        machine = Machine(proxy, stack, http)
        await machine.pair()
        await soon(machine.check_right())
    # The exporter draws its pauses from the one random generator of the process, which other tests watch.
    for thread in [one for one in threading.enumerate() if one.name == "last-spans"]:
        await asyncio.to_thread(thread.join)


async def test_off_the_context_passes_as_it_came_and_nothing_is_loaded(machine, pair) -> None:
    await machine.stream(PATH, ASK, **CONTEXT)
    for engine in pair:
        (got,) = [r.headers for r in engine.received(PATH)]
        assert got["traceparent"] == CONTEXT["traceparent"] and got["tracestate"] == "vendor=x"
    assert machine.proxy.services.traces is None and not machine.proxy.services.recorder.sinks


def test_without_the_packages_the_start_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"TRACES: must be 0 .*pip install opentelemetry-sdk"):
        load([], {"TRACES": "1"})
    assert not load([], {}).traces


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="grpc: only http/protobuf"):
        load([], {"TRACES": "1"})
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not load([], {"TRACES": "1"}).traces


def test_off_the_packages_are_not_even_loaded() -> None:
    command = "import disagg_proxy.serve, sys; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0
