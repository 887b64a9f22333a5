"""The metrics of ``GET /metrics``, collected at each scrape from existing state; docs/monitoring.md lists them.

Names end in their unit, as Prometheus recommends, and follow vLLM's names where it has the same quantity. Label values
are bounded: routes, outcomes and causes by the code, models by what instances serve (request_recorder.py), instances by
the registry, keys by API_KEYS_FILE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from disagg_proxy import __version__
from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.circuit_breaker import BreakerState
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.energy_metrics import energy_metrics
from disagg_proxy.telemetry.proxy_state import ProxyState
from disagg_proxy.telemetry.stats import Histogram

PREFIX = "disagg_proxy_"

PING_SECONDS = 3.0
"""Ping interval of P2pNcclConnector (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``, ``ping``) and of ``disagg_kv``."""

_INSTANCE_LABELS = ["role", "address"]
"""Not ``instance``: Prometheus sets that label to the scrape target, which is the proxy."""

_TURNED_AWAY = "Requests rejected with 429 because the queue was full or the wait too long"

_Value = Callable[[Instance], float | None]


def metrics_registry(proxy: ProxyState, overview: Overview) -> CollectorRegistry:
    """Everything that one scrape returns; with several workers the totals of all of them."""
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
    cumulative = list(accumulate(histogram.buckets))
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return HistogramMetricFamily(
        PREFIX + name, text, buckets=list(zip(bounds, cumulative, strict=True)), sum_value=histogram.sum
    )


def _deprecated(new_name: str) -> str:
    """The help text of a metric that has been renamed."""
    return f"Deprecated, removed after one release: use {PREFIX}{new_name}"


class ProxyCollector(Collector):
    """Requests, KV releases, instances, registrations and the access log."""

    def __init__(self, proxy: ProxyState, overview: Overview) -> None:
        self._proxy = proxy
        self._overview = overview

    def collect(self) -> Iterable[Metric]:
        """All metric families. Called by prometheus_client at each scrape."""
        info = GaugeMetricFamily(PREFIX + "build_info", "1, labelled with the version", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield from self._requests()
        yield from self._keys()
        yield from self._times()
        yield from self._kv_releases()
        yield from instance_metrics(self._proxy.registry, self._overview, self._proxy.config.kv_bytes_per_token)
        yield from self._registrations()
        yield from energy_metrics(self._proxy.energy, self._proxy.registry)
        yield from self._proxy.clock_status.metrics()

    def _requests(self) -> Iterable[Metric]:
        overview, stats, selection = self._overview, self._overview.stats, self._proxy.selection
        yield _gauge("pairs_ready", "Pairs of prefill and decode that can serve a request now", selection.ready_pairs())
        alone = selection.ready_alone() if self._proxy.config.decode_alone else 0
        yield _gauge("decodes_alone_ready", "Decodes that can serve without a prefill", alone)
        yield _gauge(
            "not_serving",
            "1 while requests wait and no decode has made progress for longer than the learnt time",
            bool(self._proxy.not_serving()),
        )
        yield _gauge("requests_in_flight", "Generation requests admitted and not finished", stats.in_flight)
        yield _gauge("requests_queued", "Generation requests waiting in the admission queue", overview.queued)
        yield _gauge(
            "requests_in_background", "Prefills and KV releases running without a client", overview.in_background
        )
        requests = CounterMetricFamily(
            PREFIX + "requests", "Finished generation requests", labels=["route", "model", "outcome", "cause"]
        )
        for labels, count in stats.labelled.items():
            route, outcome, cause, model = labels.split("\t", 3)
            requests.add_metric([route, model, outcome, cause], count)
        yield requests
        # A metric of its own: rate() needs a first sample of 0, which a labelled series does not have.
        yield _counter("requests_turned_away", _TURNED_AWAY, stats.turned_away)
        placements = CounterMetricFamily(
            PREFIX + "placements", "Attempts by where they are prefilled: split, decode_alone, prefill_alone",
            labels=["way"],
        )  # fmt: skip
        for way in Way:
            placements.add_metric([way.value], stats.ways[way.value])
        yield placements
        yield _counter("failovers", "Attempts on another pair after an instance failed", stats.failovers)
        yield _counter("prompt_tokens", "Prompt tokens of finished requests", stats.prompt_tokens)
        yield _counter(
            "prompt_tokens_cached", "Prompt tokens found in the prefix cache of prefill", stats.cached_tokens
        )
        yield _counter(
            "generation_tokens", "Output tokens of finished requests that reported usage", stats.output_tokens
        )
        yield _counter("stream_pieces", "Chunks of streamed responses relayed, mostly one token each", stats.pieces)

    def _keys(self) -> Iterable[Metric]:
        stats = self._overview.stats
        tables = (
            ("requests", "Finished generation requests by key of API_KEYS_FILE", "outcome", stats.key_requests),
            ("tokens", "Tokens of these requests that engines reported: prompt, generation", "kind", stats.key_tokens),
            ("refusals", "Requests refused with 429 by a limit of their key: requests, tokens", "limit",
             stats.key_refusals),
        )  # fmt: skip
        for name, text, label, counts in tables:
            family = CounterMetricFamily(PREFIX + "key_" + name, text, labels=["key", label])
            for labels, count in counts.items():
                family.add_metric(labels.split("\t"), count)
            yield family

    def _times(self) -> Iterable[Metric]:
        stats = self._overview.stats
        yield _histogram("request_queue_time_seconds", "Time in the admission queue, of queued requests", stats.queued)
        yield _histogram("request_prefill_time_seconds", "Time from sending a prefill to its response", stats.prefill)
        yield _histogram(
            "time_to_first_token_seconds",
            "Time from the complete request to the first byte of a streamed response, queueing included",
            stats.ttft,
        )
        yield _histogram(
            "inter_token_latency_seconds", "Time between two chunks of a streamed response, 1 of 32 sampled", stats.gap
        )
        yield _histogram(
            "e2e_request_latency_seconds", "Time from the complete request to the end of its response", stats.total
        )
        yield _histogram("request_prompt_tokens", "Prompt tokens of a request", stats.prompts)
        yield _histogram("request_generation_tokens", "Output tokens of a request that reported usage", stats.outputs)

    def _kv_releases(self) -> Iterable[Metric]:
        releases = self._overview.stats.kv_releases
        by_result = "Releases of abandoned KV by result: started, done, failed"
        for name, text in (("kv_releases", by_result), ("drains", _deprecated("kv_releases_total"))):
            family = CounterMetricFamily(PREFIX + name, text, labels=["result"])
            for result in ("started", "done", "failed"):
                family.add_metric([result], getattr(releases, result))
            yield family
        yield _gauge("kv_releases_waiting", "KV releases in progress", releases.waiting)
        yield _gauge("drains_waiting", _deprecated("kv_releases_waiting"), releases.waiting)
        yield _counter("kv_released_tokens", "Prompt tokens whose abandoned KV was released", releases.tokens)
        yield _counter("drained_tokens", _deprecated("kv_released_tokens_total"), releases.tokens)

    def _registrations(self) -> Iterable[Metric]:
        overview = self._overview
        yield _counter("registrations", "Registration messages received", overview.registrations.messages)
        dropped = CounterMetricFamily(
            PREFIX + "registrations_dropped", "Registration messages dropped, by kind", labels=["kind"]
        )
        for kind, count in overview.registrations.dropped.items():
            dropped.add_metric([kind], count)
        dropped.add_metric(["refused"], sum(overview.refused.values()))
        yield dropped
        stats = overview.stats
        lines, errors = stats.access_log_lines_dropped, stats.access_log_write_errors
        yield _counter("access_log_lines_dropped", "Lines of the access log that were dropped", lines)
        yield _counter("access_log_write_errors", "Failed writes of the access log; its lines are retried", errors)
        if overview.workers:
            yield _gauge("workers", "Workers that are serving", sum(w["responding"] for w in overview.workers))
            yield _counter("worker_restarts", "Workers replaced after they ended", overview.restarts)


def instance_metrics(registry: Registry, overview: Overview, kv_bytes_per_token: int) -> Iterable[Metric]:
    """The metrics of each instance: its state as this process sees it, and the counts of all processes."""
    instances = registry.instances()
    now = registry.now()

    def age(instance: Instance) -> float | None:
        return None if instance.last_ping is None else now - instance.last_ping

    def missed(instance: Instance) -> float | None:
        return None if instance.last_ping is None else max(0, int((now - instance.last_ping) / PING_SECONDS))

    def counted(name: str) -> _Value:
        return lambda instance: overview.counted(instance)[name]

    def seen(name: str) -> _Value:
        return lambda instance: overview.seen_count(instance, name)

    def shown(name: str) -> _Value:
        return lambda instance: getattr(instance.engine_load, name, None)

    gauges: list[tuple[str, str, _Value]] = [
        ("ready", "1 while it may receive requests", lambda i: i.state is State.READY and not i.draining),
        ("draining", "1 while drained for maintenance", lambda i: i.draining),
        ("frozen", "1 while its engine is stalled", lambda i: i.state is State.FROZEN),
        ("suspect", "1 while it may be stalled and gets only what no other can serve", overview.suspect),
        ("busy", "1 for 2 s after it rejected a leg because it is busy, unless it serves one", overview.busy),
        ("restart_wanted", "1 when only a restart can recover it", lambda i: i.restart_wanted),
        ("in_flight", "Legs in flight", lambda i: i.in_flight),
        ("tokens_in_flight", "Prompt tokens of its legs in flight, estimated", overview.tokens_in_flight),
        ("kv_waiting_prompts", "Prompts sent to prefill whose KV decode has not loaded yet", lambda i: i.kv_waiting),
        ("kv_waiting_tokens", "Tokens of KV in a decode's buffer or on the way to it", lambda i: i.kv_waiting_tokens),
        (
            "kv_waiting_bytes",
            "The same in bytes; 0 without KV_BYTES_PER_TOKEN",
            lambda i: i.kv_waiting_tokens * kv_bytes_per_token,
        ),
        ("engine_requests_running", "Requests in its batch, as its own /metrics show", shown("running")),
        ("engine_requests_waiting", "Requests that wait in its scheduler, likewise", shown("waiting")),
        ("kv_cache_usage_ratio", "Share of its KV cache in use, likewise", shown("kv_usage")),
        ("kv_cache_capacity_tokens", "Tokens that its KV cache holds, likewise", shown("kv_capacity_tokens")),
        ("ping_age_seconds", "Time since its last ping", age),
        ("pings_missed", "Pings missed since its last one", missed),
    ]
    counters: list[tuple[str, str, _Value]] = [
        ("requests", "Legs sent to it", counted("requests_total")),
        ("failures", "Legs that failed on it", counted("failures_total")),
        ("rejections", "Legs that it rejected because it is busy (429, 503)", counted("rejections_total")),
        ("freezes", "Times its engine stalled", counted("freezes")),
        ("replays", "Prefills replayed to recover a decode that waits for KV", counted("replays")),
        ("kv_releases", "Releases of abandoned KV that succeeded on it", counted("kv_releases")),
        ("kv_releases_failed", "Releases of abandoned KV that failed on it", counted("kv_releases_failed")),
        ("drains", _deprecated("instance_kv_releases_total"), counted("kv_releases")),
        ("drains_failed", _deprecated("instance_kv_releases_failed_total"), counted("kv_releases_failed")),
        ("kv_missing", "Prefill responses without the location of their KV", counted("kv_missing")),
        ("prefills_refused", "Prefills it refused of requests that decode accepted", counted("prefills_refused")),
        ("kv_dropped_prompts", "Prompts whose KV prefill gave up before decode loaded it", shown("kv_dropped")),
        ("times_lost", "Times it stopped being ready", seen("times_lost")),
        ("restarts", "Times its process was seen to end", seen("restarts")),
        ("role_moves", "Times its assigned role changed between prefill and decode", seen("role_moves")),
    ]
    for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, text, value in table:
            family = kind(PREFIX + "instance_" + name, text, labels=_INSTANCE_LABELS)
            for instance in instances:
                if (number := value(instance)) is not None:
                    family.add_metric(_labels(instance), number)
            yield family
    yield _states(instances)
    yield _breakers(instances, overview)


def _labels(instance: Instance) -> list[str]:
    return [instance.role.value, instance.http.text]


def _states(instances: Iterable[Instance]) -> Metric:
    states = GaugeMetricFamily(
        PREFIX + "instance_state", "1 for its current state, 0 for the others", labels=[*_INSTANCE_LABELS, "state"]
    )
    for instance in instances:
        for state in State:
            states.add_metric([*_labels(instance), state.value], instance.state is state)
    return states


def _breakers(instances: Iterable[Instance], overview: Overview) -> Metric:
    family = GaugeMetricFamily(
        PREFIX + "instance_breaker", "Processes of the proxy whose circuit breaker for it is in the state",
        labels=[*_INSTANCE_LABELS, "state"],
    )  # fmt: skip
    for instance in instances:
        for state in BreakerState:
            family.add_metric([*_labels(instance), state.value], overview.breakers(instance, state))
    return family


class WorkersCollector(Collector):
    """The metrics of prometheus_client's ProcessCollector for each worker, with the label ``worker``.

    Args:
        pids: process ids by worker number; None or 0 for a worker that is not running.
    """

    def __init__(self, pids: Sequence[int | None]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """All metric families. Called by prometheus_client at each scrape."""
        merged: dict[str, Metric] = {}
        for number, pid in enumerate(self._pids):
            if not pid:
                continue
            process = ProcessCollector(pid=partial(int, pid), registry=CollectorRegistry())
            for metric in process.collect():
                family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {**sample.labels, "worker": str(number)}, sample.value)
        return merged.values()
