"""The generation routes of the Quart application: from its request to a flight, and from the outcome to its response.

Served through uvicorn, it gets what ``direct`` leaves: chunked and compressed bodies, pipelined requests, browsers, and
whatever is refused before its body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from quart import Blueprint, Response, request

from disagg_proxy.errors import ProxyError
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.http.asked import read_body, sent_headers
from disagg_proxy.http.exchange import handles, own
from disagg_proxy.http.generation import answer_head, asked, begin
from disagg_proxy.launch import CARRIERS, Carrier
from disagg_proxy.protocol.fields import GENERATION, Route
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
        head = asked(services, route, sent_headers())
        begun = begin(services, head, await read_body())
        flight = begun if isinstance(begun, CARRIERS) else await begun
        own(request.scope, flight)
        outcome = await _outcome(flight)
        body = outcome.body if isinstance(outcome.body, bytes) else outcome.body.__aiter__()
        response = Response(body, status=outcome.status, content_type="application/json")
        # An engine may be silent for minutes; DECODE_TIMEOUT decides, not the framework.
        response.timeout = None
        for name, value in answer_head(outcome, head.client_id, flight):
            response.headers[name.decode("latin-1")] = value.decode("latin-1")
        return response

    return handle


async def _outcome(flight: Carrier) -> Outcome:
    """
    Raises:
        ProxyError: the request ended without an answer of an instance.
    """
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def told(what: Outcome | ProxyError) -> None:
        if future.done():
            return
        if isinstance(what, ProxyError):
            future.set_exception(what)
        else:
            future.set_result(what)

    flight.start(told)
    return await future
