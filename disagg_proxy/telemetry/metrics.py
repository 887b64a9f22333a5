"""The Prometheus view: made from the state at each scrape, so that nothing is counted twice. Listed in
docs/monitoring.md.

Names end in their unit, as Prometheus wants it, and are vLLM's own words where it has one. Labels are bounded: routes,
outcomes and causes by the code, models by what instances serve (telemetry/request_recorder.py), instances by the
registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from disagg_proxy import __version__
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.instance_metrics import instance_metrics
from disagg_proxy.telemetry.names import PREFIX
from disagg_proxy.telemetry.proxy_state import ProxyState
from disagg_proxy.telemetry.stats import Histogram


def metrics_registry(proxy: ProxyState, overview: Overview) -> CollectorRegistry:
    """What one scrape shows, whole from any worker."""
    registry = CollectorRegistry()
    registry.register(ProxyCollector(proxy, overview))
    if overview.workers:
        registry.register(WorkersCollector([worker["pid"] for worker in overview.workers]))
    else:
        ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    below = list(accumulate(histogram.buckets))
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return HistogramMetricFamily(
        PREFIX + name, text, buckets=list(zip(bounds, below, strict=True)), sum_value=histogram.sum
    )


class ProxyCollector(Collector):
    """Requests, instances, drains and registrations."""

    def __init__(self, proxy: ProxyState, overview: Overview) -> None:
        self._proxy = proxy
        self._overview = overview

    def collect(self) -> Iterable[Metric]:
        """Called by the client library at each scrape."""
        info = GaugeMetricFamily(PREFIX + "build_info", "1, with the version", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield from self._requests()
        yield from self._times()
        yield from self._kv()
        yield from instance_metrics(self._proxy.registry, self._overview)
        yield from self._registrations()

    def _requests(self) -> Iterable[Metric]:
        overview, stats, selection = self._overview, self._overview.stats, self._proxy.selection
        yield _gauge("pairs_ready", "Pairs of prefill and decode that can serve", selection.ready_pairs())
        alone = len(selection.standalone_decodes(None)) if self._proxy.config.decode_alone else 0
        yield _gauge("decodes_alone_ready", "Decodes that can serve without a prefill", alone)
        yield _gauge("requests_in_flight", "Generation requests that have places on instances", stats.in_flight)
        yield _gauge("requests_queued", "Generation requests that wait for room", overview.queued)
        yield _gauge(
            "requests_in_background", "Prefills and drains that go on without a client", overview.in_background
        )
        requests = CounterMetricFamily(
            PREFIX + "requests", "Finished generation requests", labels=["route", "model", "outcome", "cause"]
        )
        for labels, count in stats.labelled.items():
            route, outcome, cause, model = labels.split("\t", 3)
            requests.add_metric([route, model, outcome, cause], count)
        yield requests
        # By itself, since a rate needs a 0 to begin with, which series with labels do not have.
        yield _counter("requests_turned_away", "Requests that got 429 from the proxy itself", stats.turned_away)
        yield _counter("failovers", "Tries on another pair after an instance failed", stats.failovers)
        yield _counter("prompt_tokens", "Prompt tokens of finished requests", stats.prompt_tokens)
        yield _counter(
            "prompt_tokens_cached", "Prompt tokens that prefill had in its prefix cache", stats.cached_tokens
        )
        yield _counter(
            "generation_tokens", "Output tokens of finished requests whose answers said how many", stats.output_tokens
        )
        yield _counter("stream_pieces", "Pieces of streamed answers passed on, mostly a token each", stats.pieces)

    def _times(self) -> Iterable[Metric]:
        stats = self._overview.stats
        yield _histogram("request_queue_time_seconds", "Wait in the queue, of those that had to wait", stats.queued)
        yield _histogram("request_prefill_time_seconds", "From asking prefill to its answer", stats.prefill)
        yield _histogram(
            "time_to_first_token_seconds",
            "From the complete request to the first byte of a streamed answer, the queue included",
            stats.ttft,
        )
        yield _histogram(
            "inter_token_latency_seconds", "Between two pieces of a streamed answer; of 32 one is measured", stats.gap
        )
        yield _histogram(
            "e2e_request_latency_seconds", "From the complete request to the end of the whole answer", stats.total
        )
        yield _histogram("request_prompt_tokens", "Prompt tokens of a request", stats.prompts)
        yield _histogram(
            "request_generation_tokens", "Output tokens of a request whose answer said how many", stats.outputs
        )

    def _kv(self) -> Iterable[Metric]:
        drained = self._overview.stats.drains
        drains = CounterMetricFamily(PREFIX + "drains", "Drains of prefilled KV by result", labels=["result"])
        for result in ("started", "done", "failed"):
            drains.add_metric([result], getattr(drained, result))
        yield drains
        yield _gauge("drains_waiting", "Drains that have begun and not ended", drained.waiting)
        yield _counter("drained_tokens", "Prompt tokens whose KV was freed by drains", drained.tokens)

    def _registrations(self) -> Iterable[Metric]:
        overview = self._overview
        yield _counter("registrations", "Registration messages received", overview.traffic.messages)
        dropped = CounterMetricFamily(
            PREFIX + "registrations_dropped", "Registration messages not used, by kind", labels=["kind"]
        )
        for kind, count in overview.traffic.dropped.items():
            dropped.add_metric([kind], count)
        dropped.add_metric(["refused"], sum(overview.refused.values()))
        yield dropped
        if overview.workers:
            yield _gauge("workers", "Workers that serve", sum(w["responding"] for w in overview.workers))
            yield _counter("worker_restarts", "Workers that were replaced", overview.restarts)


class WorkersCollector(Collector):
    """The figures of prometheus_client's ProcessCollector for each worker, with its number as a label.

    Args:
        pids: of the workers in their order; None where there is none now.
    """

    def __init__(self, pids: Sequence[int | None]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """Called by the client library at each scrape."""
        found: dict[str, Metric] = {}
        for number, pid in enumerate(self._pids):
            if not pid:
                continue
            process = ProcessCollector(pid=partial(int, pid), registry=CollectorRegistry())
            for metric in process.collect():
                whole = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    whole.add_sample(sample.name, {**sample.labels, "worker": str(number)}, sample.value)
        return found.values()
