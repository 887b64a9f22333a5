"""The metrics of GPUs and of energy per token, present only where an engine or POWER_GPUS reports a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from disagg_power.book import ROLES, EnergyBook, Gpu, RoleFigures
from disagg_power.devices import IDLE, THROTTLE_NAMES, throttle_names
from disagg_proxy.cluster.registry import Registry

PREFIX = "disagg_proxy_"
_LABELS = ["role", "address", "gpu"]
"""``address`` as in the metrics of instances, empty for the host's CPU packages; ``gpu`` is the UUID."""
STATES = ("ok", "stale", "lost", "mig", "no_figures")
_WH = 3600.0
_REASONS = tuple(name for bit, name in THROTTLE_NAMES.items() if bit != IDLE)


def _mega(value: int | None) -> float | None:
    return None if value is None else value * 1e6


_GAUGES: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("power_watts", "Mean power since the report before", lambda g: g.watts),
    ("sm_clock_hertz", "SM clock", lambda g: _mega(g.report.sm_clock_mhz)),
    ("memory_clock_hertz", "Memory clock", lambda g: _mega(g.report.memory_clock_mhz)),
    ("utilization_ratio", "Share of time with a kernel running", lambda g: g.report.utilization),
    ("temperature_celsius", "Temperature", lambda g: g.report.temperature_c),
)

_PER_ROLE: tuple[tuple[str, str, Callable[[RoleFigures], float | None]], ...] = (
    ("role_power_watts", "Power of the GPUs of a role", lambda f: f.watts),
    ("role_idle_power_watts", "Power of the GPUs of a role without a request", lambda f: f.idle_watts),
    (
        "role_joules_per_token",
        "Energy of a role per prompt token that prefill computed, or per output token, over the last two minutes",
        lambda f: f.joules_per_token,
    ),
)


def energy_metrics(book: EnergyBook, registry: Registry) -> Iterable[Metric]:
    """All families; none while nothing reports."""
    if not book:
        return
    now = registry.now()

    def labels_of(gpu: Gpu) -> list[str]:
        instance = registry.find(gpu.instance)
        return [gpu.role, gpu.instance if instance is None else instance.http.text, gpu.report.uuid]

    gpus = [(gpu, labels_of(gpu), gpu.state(now)) for gpu in book.gpus.values()]
    energy = CounterMetricFamily(
        PREFIX + "gpu_energy_joules", "Energy by the GPU's counter, or the integral of its power",
        labels=[*_LABELS, "source"],
    )  # fmt: skip
    states = GaugeMetricFamily(PREFIX + "gpu_state", "1 for its current state", labels=[*_LABELS, "state"])
    throttle = GaugeMetricFamily(
        PREFIX + "gpu_throttle", "1 while this reason lowers its clock", labels=[*_LABELS, "reason"]
    )
    for gpu, labels, state in gpus:
        if gpu.report.joules is not None:
            energy.add_metric([*labels, gpu.report.source], gpu.report.joules)
        for name in STATES:
            states.add_metric([*labels, name], name == state)
        if state in ("ok", "mig"):
            active = throttle_names(gpu.report.throttle)
            for reason in _REASONS:
                throttle.add_metric([*labels, reason], reason in active)
    yield energy
    yield states
    yield throttle
    for name, text, value in _GAUGES:
        family = GaugeMetricFamily(PREFIX + "gpu_" + name, text, labels=_LABELS)
        for gpu, labels, state in gpus:
            if state in ("ok", "mig") and (number := value(gpu)) is not None:
                family.add_metric(labels, number)
        yield family
    for name, text, of_role in _PER_ROLE:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["role"])
        for role in ROLES:
            figures = book.figures(role)
            if figures is not None and (number := of_role(figures)) is not None:
                family.add_metric([role], number)
        yield family
    joules, _, _ = book.per_request()
    if joules:
        yield GaugeMetricFamily(
            PREFIX + "joules_per_request", "Energy of all GPUs per answered request, last two minutes", value=joules
        )
        yield GaugeMetricFamily(
            PREFIX + "requests_per_watt_hour", "Answered requests per Wh of the GPUs, last two minutes",
            value=_WH / joules,
        )  # fmt: skip
