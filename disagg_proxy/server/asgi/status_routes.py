"""Routes that report the state of the proxy: /health, /livez, /stats, /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from quart import Blueprint, Response

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.unavailable import missing_roles, why_no_pair
from disagg_proxy.server.asgi.error_responses import json_response
from disagg_proxy.services import Services
from disagg_proxy.telemetry.metrics import metrics_registry
from disagg_proxy.telemetry.stats_report import stats_report


def status_routes(services: Services) -> Blueprint:
    """Routes that need no engine."""
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
        metrics = metrics_registry(services, await services.overview())
        return Response(generate_latest(metrics), content_type=CONTENT_TYPE_LATEST)

    return blueprint


def health_report(services: Services) -> dict[str, Any]:
    """Whether at least one pair can serve, and what is missing otherwise. Without addresses, because it is public."""
    registry = services.registry
    pairs = services.selection.ready_pairs()
    alone = len(services.selection.standalone_decodes(None)) if services.config.decode_alone else 0
    missing = missing_roles(registry)
    if not pairs and not missing:
        missing = [why_no_pair(registry)]
    shutdown = services.shutdown.begun.is_set()
    if shutdown:
        missing = ["the proxy is shutting down", *missing]
    known = registry.instances()
    return {
        "status": "stopping" if shutdown else "ok" if pairs or alone else "unavailable",
        "pairs": pairs,
        "decodes_that_serve_alone": alone,
        **{
            role.value: {"ready": len(registry.accepting(role)), "known": sum(i.role is role for i in known)}
            for role in Role
        },
        "missing": missing,
    }
