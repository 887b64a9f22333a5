"""The live page and its feed. The page itself is public; its feed needs the API key: docs/page.md."""

from __future__ import annotations

from typing import Any, cast

from quart import Blueprint, Response, request

from disagg_proxy.page.document import document
from disagg_proxy.page.feed import Feed
from disagg_proxy.page.verdict import incident, verdict
from disagg_proxy.server.asgi.exchange_scope import ENDLESS, cancel_with_exchange, leave_with_exchange
from disagg_proxy.services import Services
from disagg_proxy.telemetry.health_report import health_report

_FEED_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # nginx would buffer the events.
    "X-Accel-Buffering": "no",
}


def page_routes(services: Services) -> Blueprint:
    """``/``, ``/dashboard`` and ``/dashboard/events``."""
    blueprint = Blueprint("page", __name__)

    async def view() -> dict[str, Any]:
        shown = {**await services.page_view(), "health": health_report(services)}
        return {**shown, "verdict": verdict(shown), "incident": incident(shown)}

    feed = Feed(view, services.shutdown.begun)
    page = document()

    @blueprint.get("/")
    @blueprint.get("/dashboard")
    async def show() -> Response:
        if request.path.endswith("/dashboard/"):
            # The addresses in the page are relative to its own, also under the path prefix of a reverse proxy.
            return Response(b"", status=308, headers={"Location": "../dashboard"})
        if page.headers["ETag"].strip('"') in request.if_none_match:
            return Response(b"", status=304, headers=page.headers)
        return Response(page.body, headers=page.headers)

    @blueprint.get("/dashboard/events")
    async def events() -> Response:
        scope = cast(dict[str, Any], request.scope)
        cancel_with_exchange(scope)
        viewer = feed.join()
        leave_with_exchange(scope, viewer)
        scope[ENDLESS] = True
        return Response(viewer.messages(), headers=_FEED_HEADERS)

    return blueprint
