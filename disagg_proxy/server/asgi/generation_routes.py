"""The generation routes of the Quart application: from its request to the coordinator, and from the outcome to its
response.

Served through uvicorn, it gets what ``direct`` leaves: chunked and compressed bodies, pipelined requests, browsers, and
whatever is refused before its body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from quart import Blueprint, Response, request

from disagg_proxy.coordinator.head import read_head
from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import ProxyError
from disagg_proxy.openai.fields import GENERATION, Route
from disagg_proxy.server.asgi.exchange_scope import handles, own
from disagg_proxy.server.asgi.request import read_body, request_headers
from disagg_proxy.server.generation import answer_head
from disagg_proxy.services import Services


def generation_routes(services: Services) -> Blueprint:
    """One POST route for each way to generate."""
    blueprint = Blueprint("generate", __name__)
    for route in GENERATION:
        blueprint.add_url_rule(route.path, route.path.replace("/", "_"), _handler(services, route), methods=["POST"])
    return blueprint


def _handler(services: Services, route: Route) -> Callable[[], Awaitable[Response]]:
    async def handle() -> Response:
        handles(request.scope)
        head = read_head(services.config, services.coordinator.wanted, route, request_headers())
        body = await read_body()
        pending = _PendingOutcome()
        reply = Reply(pending)
        own(request.scope, reply)
        services.coordinator.start(head, body, reply)
        outcome = await pending.outcome
        content = outcome.body if isinstance(outcome.body, bytes) else outcome.body.__aiter__()
        response = Response(content, status=outcome.status, content_type="application/json")
        # An engine may be silent for minutes; DECODE_TIMEOUT decides, not the framework.
        response.timeout = None
        for name, value in answer_head(outcome, head.client_id, reply):
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
        return response

    return handle


class _PendingOutcome:
    """The client of a Quart handler, which awaits ``outcome``: an answer, or the ProxyError it raises."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[ClientResponse] = asyncio.get_running_loop().create_future()

    def respond(self, outcome: ClientResponse) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def refuse(self, error: ProxyError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
