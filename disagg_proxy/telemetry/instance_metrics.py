"""The metrics of each instance. Its state is as the answering process sees it, counts are those of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from disagg_proxy.cluster.circuit_breaker import BreakerState
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.names import PREFIX

PING_SECONDS = 3.0
"""Between two pings of vLLM's connector and of this project's (vLLM 0.9.2 - 0.23, ``p2p_nccl_engine.py``, ``ping``)."""

_WHERE = ["role", "address"]
"""Not ``instance``, which Prometheus gives to the proxy itself."""

_Value = Callable[[Instance], float | None]


def instance_metrics(registry: Registry, overview: Overview) -> Iterable[Metric]:
    """One sample of each for each instance."""
    instances = registry.instances()
    now = registry.now()

    def age(instance: Instance) -> float | None:
        return None if instance.last_ping is None else now - instance.last_ping

    def missed(instance: Instance) -> float | None:
        return None if instance.last_ping is None else max(0, int((now - instance.last_ping) / PING_SECONDS))

    def counted(name: str) -> _Value:
        return lambda instance: overview.counted(instance)[name]

    def seen(name: str) -> _Value:
        return lambda instance: overview.has_seen(instance, name)

    gauges: list[tuple[str, str, _Value]] = [
        ("ready", "1 when it may get requests", lambda i: i.state is State.READY and not i.draining),
        ("draining", "1 while out for maintenance", lambda i: i.draining),
        ("frozen", "1 while its engine is stalled", lambda i: i.state is State.FROZEN),
        ("restart_wanted", "1 when nothing but a restart is left to try", lambda i: i.restart_wanted),
        ("in_flight", "Legs on it now", lambda i: i.in_flight),
        ("tokens_in_flight", "Prompt tokens of the legs on it, estimated", overview.tokens_in_flight),
        ("kv_waiting_prompts", "Prompts sent to prefill whose KV decode has not loaded", lambda i: i.kv_waiting),
        ("kv_waiting_bytes", "KV that decode has not loaded, estimated", lambda i: i.kv_waiting_bytes),
        ("ping_age_seconds", "Since its last ping", age),
        ("pings_missed", "Pings that should have come since its last one", missed),
    ]
    counters: list[tuple[str, str, _Value]] = [
        ("requests", "Legs sent to it", counted("requests_total")),
        ("failures", "Legs that it failed", counted("failures_total")),
        ("freezes", "Times its engine stalled", counted("freezes")),
        ("replays", "Prefills repeated to free a decode that waits for KV", counted("replays")),
        ("drains", "KV of abandoned requests that was freed on it", counted("drains")),
        ("drains_failed", "KV of abandoned requests that was not freed on it", counted("drains_failed")),
        ("kv_missing", "Prefills that did not say where their KV is", counted("kv_missing")),
        ("prefills_refused", "Prefills it refused of requests that decode accepted", counted("prefills_refused")),
        ("times_lost", "Times it stopped being ready", seen("times_lost")),
        ("restarts", "Times its process was seen to have ended", seen("restarts")),
    ]
    for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, text, value in table:
            family = kind(PREFIX + "instance_" + name, text, labels=_WHERE)
            for instance in instances:
                if (number := value(instance)) is not None:
                    family.add_metric(_where(instance), number)
            yield family
    yield _states(instances)
    yield _breakers(instances, overview)


def _where(instance: Instance) -> list[str]:
    return [instance.role.value, instance.http.text]


def _states(instances: Iterable[Instance]) -> Metric:
    states = GaugeMetricFamily(PREFIX + "instance_state", "1 for the state that it is in", labels=[*_WHERE, "state"])
    for instance in instances:
        for state in State:
            states.add_metric([*_where(instance), state.value], instance.state is state)
    return states


def _breakers(instances: Iterable[Instance], overview: Overview) -> Metric:
    family = GaugeMetricFamily(
        PREFIX + "instance_breaker", "Processes of the proxy whose circuit breaker for it is in the state",
        labels=[*_WHERE, "state"],
    )  # fmt: skip
    for instance in instances:
        for state in BreakerState:
            family.add_metric([*_where(instance), state.value], overview.breakers(instance, state))
    return family
