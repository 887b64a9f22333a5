"""The body of ``GET /stats``, and the report of one instance that the admin API and the page share."""

from __future__ import annotations

from typing import Any

from disagg_proxy import __version__, compiled
from disagg_proxy.cluster.choice import Way
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.telemetry.aggregate import Overview
from disagg_proxy.telemetry.health_report import health_report
from disagg_proxy.telemetry.proxy_state import ProxyState

_SIMULATED = "disagg_sim"
"""``owned_by`` in the model list of a simulated engine (disagg_sim/http.py); vLLM's own says "vllm"."""


def stats_report(proxy: ProxyState, overview: Overview) -> dict[str, Any]:
    """The body of /stats. Latencies are in seconds, over the last 2048 values of each worker."""
    stats = overview.stats
    kv_releases = {
        "started": stats.kv_releases.started,
        "done": stats.kv_releases.done,
        "failed": stats.kv_releases.failed,
        "waiting": stats.kv_releases.waiting,
        "tokens": stats.kv_releases.tokens,
    }
    report = {
        "version": __version__,
        "compiled": compiled(),
        "uptime_s": round(stats.clock() - stats.started_at, 3),
        "health": health_report(proxy),
        "instances": instance_reports(proxy, overview),
        "requests": {
            "in_flight": stats.in_flight,
            "finished": sum(stats.outcomes.values()),
            "outcomes": dict(stats.outcomes),
            "in_background": overview.in_background,
            "failovers": stats.failovers,
            "queued": overview.queued,
            "turned_away": stats.turned_away,
        },
        "placement": placement_report(proxy, overview),
        "latency": {
            "queue": stats.queued.summary(),
            "prefill": stats.prefill.summary(),
            "ttft": stats.ttft.summary(),
            "total": stats.total.summary(),
            "gap": stats.gap.summary(),
        },
        "kv_releases": kv_releases,
        "drains": kv_releases,  # Its former name, removed after one release.
        "discovery": {
            "messages": overview.registrations.messages,
            "dropped": dict(overview.registrations.dropped),
            "refused": dict(overview.refused),
        },
    }
    if (energy := proxy.energy.report(proxy.registry.now())) is not None:
        report["energy"] = energy
    if proxy.worker is not None:
        report["answered_by"] = proxy.worker
        report["workers"] = overview.workers
    return report


def placement_report(proxy: ProxyState, overview: Overview) -> dict[str, Any]:
    """What the placement of this process has learnt, and attempts by way, of all processes."""
    ways = overview.stats.ways
    return {**proxy.placement_report(), "requests": {way.value: ways[way.value] for way in Way}}


def instance_reports(proxy: ProxyState, overview: Overview) -> list[dict[str, Any]]:
    """The reports of all instances."""
    return [instance_report(i, proxy, overview) for i in proxy.registry.instances()]


def instance_report(instance: Instance, proxy: ProxyState, overview: Overview) -> dict[str, Any]:
    """One instance: its state as this process sees it, and the counts of all processes."""
    registry = proxy.registry
    counted = overview.counted(instance)
    now = registry.now()
    assignment = instance.assignment
    decodes = registry.ready(Role.DECODE) if instance.serves(Role.PREFILL) else ()
    incompatible = {
        d.http.text: why
        for d in decodes
        if d is not instance and (why := registry.kv_compatibility.why_not(instance, d))
    }
    return {
        "role": instance.role.value,
        "roles": [role.value for role in instance.roles],
        "assigned_role": instance.assigned_role.value if instance.assigned_role is not None else None,
        "assigned_role_age_s": None if assignment is None else round(max(0.0, now - assignment.at), 3),
        "assigned_role_reason": None if assignment is None else assignment.reason,
        "role_moves": overview.seen_count(instance, "role_moves"),
        "http_address": instance.http.text,
        "kv_address": instance.kv.text if instance.kv else None,
        "models": list(instance.models),
        "simulated": any(card.get("owned_by") == _SIMULATED for card in instance.models.values()),
        "state": instance.state.value,
        "reason": instance.explanation,
        "draining": instance.draining,
        "idle": proxy.idle(instance),
        "source": instance.source.value,
        "last_ping_age_s": None if instance.last_ping is None else round(now - instance.last_ping, 3),
        "in_flight": instance.in_flight,
        "tokens_in_flight": overview.tokens_in_flight(instance),
        "kv_waiting": instance.kv_waiting,
        "kv_waiting_tokens": instance.kv_waiting_tokens,
        "kv_waiting_bytes": instance.kv_waiting_tokens * proxy.config.kv_bytes_per_token,
        "kv_missing": counted["kv_missing"],
        "prefills_refused": counted["prefills_refused"],
        "requests_total": counted["requests_total"],
        "failures_total": counted["failures_total"],
        "rejections_total": counted["rejections_total"],
        "times_lost": overview.seen_count(instance, "times_lost"),
        "restarts": overview.seen_count(instance, "restarts"),
        "kv_protocol": instance.kind.protocol,
        "cannot_exchange_with": list(incompatible),
        "cannot_exchange_because": incompatible,
        "kv_transports": instance.kv_links,
        "kv_control_refused": instance.kv_control_refused or None,
        "breaker": instance.breaker.state(now).value,
        "freezes": counted["freezes"],
        "replays": counted["replays"],
        "kv_releases": counted["kv_releases"],
        "kv_releases_failed": counted["kv_releases_failed"],
        "drains": counted["kv_releases"],  # Former names, removed after one release.
        "drains_failed": counted["kv_releases_failed"],
        "suspect": overview.suspect(instance),
        "busy": overview.busy(instance),
        "restart_wanted": instance.restart_wanted,
        "engine_load": _engine_load(instance, now),
    }


def _engine_load(instance: Instance, now: float) -> dict[str, Any] | None:
    """What the engine shows of itself; None where it shows nothing, or nothing in the proxy needs it now."""
    load = instance.engine_load
    if load is None:
        return None
    return {
        "age_s": round(now - load.at, 3),
        "running": load.running,
        "waiting": load.waiting,
        "kv_usage": None if load.kv_usage is None else round(load.kv_usage, 4),
        "kv_capacity_tokens": load.kv_capacity_tokens,
        "kv_dropped": load.kv_dropped,
    }
