"""The generation routes: from Quart's request to a flight, and from its outcome to Quart's response."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from multidict import CIMultiDict
from quart import Blueprint, Response, request

from disagg_proxy.errors import UnsupportedEncoding
from disagg_proxy.http.exchange import own
from disagg_proxy.protocol.fields import ROUTES, Route
from disagg_proxy.protocol.headers import client_request_id, connection_tokens, request_headers
from disagg_proxy.protocol.prepare import prepare
from disagg_proxy.services import Services


def generation_routes(services: Services) -> Blueprint:
    """One POST route for each way to generate."""
    blueprint = Blueprint("generate", __name__)
    for route in ROUTES:
        blueprint.add_url_rule(route.path, route.path.replace("/", "_"), _handler(services, route), methods=["POST"])
    return blueprint


def _handler(services: Services, route: Route) -> Callable[[], Awaitable[Response]]:
    async def handle() -> Response:
        prepared = prepare(route, await read_body())
        client_id = client_request_id(request.headers)
        flight = await services.launcher.launch(route, forwarded_headers(services), prepared, client_id)
        own(request.scope, flight)
        outcome = await flight.answer()
        response = Response(outcome.body, status=outcome.status, content_type="application/json")
        # An engine may be silent for minutes; DECODE_TIMEOUT decides, not the framework.
        response.timeout = None
        for name, value in outcome.headers:
            response.headers[name] = value
        response.headers["X-Request-Id"] = client_id or flight.public_id[:32]
        return response

    return handle


async def read_body() -> bytes:
    """The whole body.

    Raises:
        UnsupportedEncoding: it is compressed.
    """
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"Content-Encoding {encoding!r} is not read; send the body uncompressed.")
    return cast(bytes, await request.get_data(cache=False, as_text=False))


def forwarded_headers(services: Services) -> CIMultiDict[str]:
    """The client's headers for the instances."""
    return request_headers(request.headers.items(), connection_tokens(request.headers), services.config.engine_api_key)
