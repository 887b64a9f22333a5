"""Routes that report the state of the proxy: /health, /livez, /stats, /metrics."""

from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from quart import Blueprint, Response

from disagg_proxy.server.asgi.error_responses import json_response
from disagg_proxy.services import Services
from disagg_proxy.telemetry.health_report import health_report
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
