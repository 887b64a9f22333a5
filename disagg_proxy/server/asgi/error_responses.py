"""Answers other than an engine's own: errors as OpenAI-style JSON, and an engine's whole answer passed on."""

from __future__ import annotations

import json
import logging
from typing import Any

from quart import Quart, Response
from werkzeug.exceptions import HTTPException

from disagg_proxy.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientError,
    MethodNotAllowed,
    NotFound,
    ProxyError,
    answer_of,
)
from disagg_proxy.http1.headers import Headers, client_request_id, forwarded_response_headers
from disagg_proxy.server.asgi.request import request_headers
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)


def error_parts(error: ProxyError, client_id: str | None) -> tuple[int, Headers, bytes]:
    """The error's answer for both ways out; one that is the server's fault is logged."""
    if error.status >= 500:
        log.warning("%d %s: %s", error.status, error.code, error.message)
    return answer_of(error, client_id)


def from_bug(error: Exception) -> ProxyError:
    """What the client is told when the proxy itself fails; the log has the rest."""
    log.error("A request failed inside the proxy", exc_info=error)
    return ProxyError("The proxy failed; its log has the cause.")


def error_response(error: ProxyError) -> Response:
    """The one place where an error becomes Quart's response."""
    status, headers, body = error_parts(error, client_request_id(request_headers()))
    return Response(body, status=status, headers={name.decode(): value.decode() for name, value in headers})


def json_response(value: Any, status: int = 200) -> Response:
    """Compact JSON."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(body, status=status, content_type="application/json")


def passed_on(answer: CompleteResponse) -> Response:
    """An engine's answer to a route that concerns no KV transfer."""
    response = Response(answer.body, status=answer.status, content_type="application/json")
    for name, value in forwarded_response_headers(answer.headers, None):
        response.headers[name.decode("latin-1")] = value.decode("latin-1")
    return response


def install_error_handlers(app: Quart, max_body_bytes: int) -> None:
    """Every failure of a handler ends in :func:`error_response`."""

    async def on_proxy_error(error: ProxyError) -> Response:
        return error_response(error)

    async def on_http_error(error: HTTPException) -> Response:
        return error_response(_from_werkzeug(error, max_body_bytes))

    async def on_bug(error: Exception) -> Response:
        return error_response(from_bug(error))

    app.register_error_handler(ProxyError, on_proxy_error)
    app.register_error_handler(HTTPException, on_http_error)
    app.register_error_handler(Exception, on_bug)


def _from_werkzeug(error: HTTPException, max_body_bytes: int) -> ProxyError:
    if error.code == 404:
        return NotFound("There is no such path here.")
    if error.code == 405:
        return MethodNotAllowed("This path does not take that HTTP method.")
    if error.code == 408:
        return BodyTimeout("The request body did not arrive in time (BODY_TIMEOUT).")
    if error.code == 413:
        return BodyTooLarge(f"The request body is longer than {max_body_bytes} bytes (MAX_BODY_BYTES).")
    if error.code is not None and error.code < 500:
        refusal = ClientError(error.description or error.name)
        refusal.status = error.code
        return refusal
    return ProxyError("The proxy failed; its log has the cause.")
