"""The Prometheus view: made from the state at each scrape, so that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg_proxy.cluster.instance import State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.workers.overview import Overview

_PREFIX = "disagg_proxy_"


class ProxyCollector(Collector):
    """Instances, requests, drains and registrations."""

    def __init__(self, registry: Registry, overview: Overview) -> None:
        self._registry = registry
        self._overview = overview

    def collect(self) -> Iterable[Metric]:
        """Called by the client library at each scrape."""
        yield from self._instances()
        overview, stats = self._overview, self._overview.stats
        yield GaugeMetricFamily(
            _PREFIX + "requests_in_flight", "Generation requests whose clients wait", value=stats.in_flight
        )
        outcomes = CounterMetricFamily(
            _PREFIX + "requests", "Finished generation requests by outcome", labels=["outcome"]
        )
        for outcome, count in stats.outcomes.items():
            outcomes.add_metric([outcome], count)
        yield outcomes
        drains = CounterMetricFamily(_PREFIX + "drains", "Drains of prefilled KV by result", labels=["result"])
        for result in ("started", "done", "failed"):
            drains.add_metric([result], getattr(stats.drains, result))
        yield drains
        yield CounterMetricFamily(
            _PREFIX + "drained_tokens", "Prompt tokens whose KV was freed by drains", value=stats.drains.tokens
        )
        yield CounterMetricFamily(
            _PREFIX + "registrations", "Registration messages received", value=overview.traffic.messages
        )
        dropped = CounterMetricFamily(
            _PREFIX + "registrations_dropped", "Registration messages not used, by kind", labels=["kind"]
        )
        for kind, count in overview.traffic.dropped.items():
            dropped.add_metric([kind], count)
        dropped.add_metric(["refused"], sum(overview.refused.values()))
        yield dropped
        if overview.workers:
            yield GaugeMetricFamily(
                _PREFIX + "workers", "Workers that serve", value=sum(w["responding"] for w in overview.workers)
            )
            yield CounterMetricFamily(
                _PREFIX + "worker_restarts", "Workers that were replaced", value=overview.restarts
            )

    def _instances(self) -> Iterable[Metric]:
        labels = ["role", "instance"]
        ready = GaugeMetricFamily(_PREFIX + "instance_ready", "1 when the instance may get requests", labels=labels)
        draining = GaugeMetricFamily(_PREFIX + "instance_draining", "1 while out for maintenance", labels=labels)
        load = GaugeMetricFamily(_PREFIX + "instance_in_flight", "Legs on the instance now", labels=labels)
        legs = CounterMetricFamily(_PREFIX + "instance_requests", "Legs sent to the instance", labels=labels)
        failures = CounterMetricFamily(_PREFIX + "instance_failures", "Legs that the instance failed", labels=labels)
        frozen = GaugeMetricFamily(_PREFIX + "instance_frozen", "1 while its engine stands still", labels=labels)
        freezes = CounterMetricFamily(_PREFIX + "instance_freezes", "Times its engine stood still", labels=labels)
        replays = CounterMetricFamily(
            _PREFIX + "instance_replays", "Prefills repeated to free a decode that waits for KV", labels=labels
        )
        for instance in self._registry.instances():
            counted = self._overview.counted(instance)
            where = [instance.role.value, instance.http.text]
            ready.add_metric(where, instance.state is State.READY and not instance.draining)
            draining.add_metric(where, instance.draining)
            load.add_metric(where, instance.in_flight)
            legs.add_metric(where, counted["requests_total"])
            failures.add_metric(where, counted["failures_total"])
            frozen.add_metric(where, instance.state is State.FROZEN)
            freezes.add_metric(where, counted["freezes"])
            replays.add_metric(where, counted["replays"])
        return [ready, draining, load, legs, failures, frozen, freezes, replays]
