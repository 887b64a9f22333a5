"""What the proxy says of itself: /health, /livez, /stats, /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from quart import Blueprint, Response

from disagg_proxy import __version__
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.http.metrics import ProxyCollector
from disagg_proxy.http.respond import json_response
from disagg_proxy.services import Services
from disagg_proxy.workers.overview import Overview


def status_routes(services: Services) -> Blueprint:
    """Routes that are answered from memory."""
    blueprint = Blueprint("status", __name__)

    @blueprint.get("/livez")
    async def livez() -> Response:
        return json_response({"status": "ok"})

    @blueprint.get("/health")
    async def health() -> Response:
        report = health_report(services)
        return json_response(report, 200 if report["status"] == "ok" else 503)

    @blueprint.get("/stats")
    async def stats() -> Response:
        return json_response(stats_report(services, await services.overview()))

    @blueprint.get("/metrics")
    async def metrics_text() -> Response:
        metrics = CollectorRegistry()
        metrics.register(ProxyCollector(services.registry, await services.overview()))
        return Response(generate_latest(metrics), content_type=CONTENT_TYPE_LATEST)

    return blueprint


def health_report(services: Services) -> dict[str, Any]:
    """Whether at least one pair can serve, and what is missing if none can. Names no address: it needs no key."""
    registry = services.registry
    pairs = services.pairing.ready_pairs()
    alone = len(services.pairing.loners(None)) if services.config.decode_alone else 0
    missing = registry.missing()
    if not pairs and not missing:
        missing = [services.pairing.why_no_pair()]
    stopping = services.stopping.begun.is_set()
    if stopping:
        missing = ["the proxy is shutting down", *missing]
    known = registry.instances()
    return {
        "status": "stopping" if stopping else "ok" if pairs or alone else "unavailable",
        "pairs": pairs,
        "decodes_that_serve_alone": alone,
        **{
            role.value: {"ready": len(services.pairing.taking(role)), "known": sum(i.role is role for i in known)}
            for role in Role
        },
        "missing": missing,
    }


def stats_report(services: Services, overview: Overview) -> dict[str, Any]:
    """Everything in numbers. Latencies in seconds over the last 2048 requests, of each worker."""
    stats = overview.stats
    report = {
        "version": __version__,
        "uptime_s": round(stats.clock() - stats.started_at, 3),
        "instances": instance_reports(services, overview),
        "requests": {
            "in_flight": stats.in_flight,
            "finished": sum(stats.outcomes.values()),
            "outcomes": dict(stats.outcomes),
            "in_background": overview.in_background,
            "failovers": stats.failovers,
            "queued": overview.queued,
            "turned_away": stats.turned_away,
        },
        "latency": {
            "queue": stats.queued.summary(),
            "prefill": stats.prefill.summary(),
            "ttft": stats.ttft.summary(),
            "total": stats.total.summary(),
        },
        "drains": {
            "started": stats.drains.started,
            "done": stats.drains.done,
            "failed": stats.drains.failed,
            "waiting": stats.drains.waiting,
            "tokens": stats.drains.tokens,
        },
        "discovery": {
            "messages": overview.traffic.messages,
            "dropped": dict(overview.traffic.dropped),
            "refused": dict(overview.refused),
        },
    }
    if services.member is not None:
        report["answered_by"] = services.member.seat.worker
        report["workers"] = overview.workers
    return report


def instance_reports(services: Services, overview: Overview) -> list[dict[str, Any]]:
    """All instances as /stats shows them."""
    return [instance_report(i, services, overview) for i in services.registry.instances()]


def instance_report(instance: Instance, services: Services, overview: Overview) -> dict[str, Any]:
    """One instance as /stats shows it: its state as this process sees it, and what all have counted."""
    registry = services.registry
    counted = overview.counted(instance)
    now = registry.now()
    decodes = registry.ready(Role.DECODE) if instance.role is Role.PREFILL else ()
    apart = {d.http.text: why for d in decodes if (why := registry.exchange.why_not(instance, d))}
    return {
        "role": instance.role.value,
        "http_address": instance.http.text,
        "kv_address": instance.kv.text if instance.kv else None,
        "models": list(instance.models),
        "state": instance.state.value,
        "reason": instance.explanation,
        "draining": instance.draining,
        "idle": services.idle(instance),
        "source": instance.source.value,
        "last_ping_age_s": None if instance.last_ping is None else round(now - instance.last_ping, 3),
        "in_flight": instance.in_flight,
        "kv_waiting": instance.kv_waiting,
        "kv_waiting_bytes": instance.kv_waiting_bytes,
        "kv_missing": instance.kv_missing,
        "requests_total": counted["requests_total"],
        "failures_total": counted["failures_total"],
        "times_lost": instance.times_lost,
        "kv_protocol": instance.kind.protocol,
        "cannot_exchange_with": list(apart),
        "cannot_exchange_because": apart,
        "breaker": instance.breaker.state(now).value,
        "freezes": counted["freezes"],
        "replays": counted["replays"],
        "restart_wanted": instance.restart_wanted,
    }
