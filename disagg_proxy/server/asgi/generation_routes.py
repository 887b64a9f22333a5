"""The generation routes of the Quart application: from a request to the coordinator, and from its outcome to a reply.

They handle what ``fast_path`` does not: chunked and compressed bodies, pipelined requests, requests of browsers, and
whatever is refused before its body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from quart import Blueprint, Response, request

from disagg_proxy.coordinator.coordinator import read_head
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import ProxyError
from disagg_proxy.openai.error_answer import stream_error
from disagg_proxy.openai.fields import GENERATION, Route
from disagg_proxy.server.asgi.auth import client_key, show_rate_limit
from disagg_proxy.server.asgi.error_responses import error_response
from disagg_proxy.server.asgi.exchange_scope import ERROR_EVENT, cancel_with_exchange, leave_with_exchange
from disagg_proxy.server.asgi.request import read_body, request_headers, request_id
from disagg_proxy.services import Services


def generation_routes(services: Services) -> Blueprint:
    """One POST route for each generation API."""
    blueprint = Blueprint("generate", __name__)
    for route in GENERATION:
        blueprint.add_url_rule(route.path, route.path.replace("/", "_"), _handler(services, route), methods=["POST"])
    return blueprint


def _handler(services: Services, route: Route) -> Callable[[], Awaitable[Response]]:
    async def handle() -> Response:
        scope = cast(dict[str, Any], request.scope)
        cancel_with_exchange(scope)
        head = read_head(services.config, services.coordinator.wanted, route, request_headers(), client_key())
        body = await read_body()
        pending = _PendingOutcome()
        reply = Reply(pending, head.client_id, "" if head.client_id else request_id())
        leave_with_exchange(scope, reply)
        services.coordinator.start(head, body, reply)
        try:
            outcome = await pending.outcome
        finally:
            show_rate_limit(reply.headers)
        response = error_response(outcome) if isinstance(outcome, ProxyError) else respond(outcome, scope)
        if services.config.served_by_header and reply.served_by:
            response.headers["x-served-by"] = reply.served_by
        return response

    def respond(outcome: ClientResponse, scope: dict[str, Any]) -> Response:
        content = outcome.body if isinstance(outcome.body, bytes) else outcome.body.__aiter__()
        response = Response(content, status=outcome.status, content_type="application/json")
        # No limit of the framework's: an engine may compute for minutes, and DECODE_TIMEOUT applies.
        response.timeout = None
        for name, value in outcome.headers:
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
        if not isinstance(content, bytes):
            # nginx would buffer the events.
            response.headers["x-accel-buffering"] = "no"
            if services.config.stream_error_event:
                scope[ERROR_EVENT] = partial(stream_error, route)
        return response

    return handle


class _PendingOutcome:
    """Hands the outcome to a Quart handler: ``outcome`` resolves to a response or an error."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[ClientResponse | ProxyError] = asyncio.get_running_loop().create_future()

    def respond(self, outcome: ClientResponse) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def refuse(self, error: ProxyError) -> None:
        if not self.outcome.done():
            self.outcome.set_result(error)
