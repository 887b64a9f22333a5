"""Quart responses other than generation: errors as OpenAI-style JSON, and an engine's complete response."""

from __future__ import annotations

import json
import logging
from typing import Any

from quart import Quart, Response
from werkzeug import exceptions

from disagg_proxy.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientError,
    MethodNotAllowed,
    NotFound,
    ProxyError,
    answer_of,
    retry_headers,
)
from disagg_proxy.http1.headers import Headers, forwarded_response_headers
from disagg_proxy.server.asgi.request import request_id
from disagg_proxy.upstream import CompleteResponse

log = logging.getLogger(__name__)

_INTERNAL = "The proxy failed; its log has the cause."


def error_parts(error: ProxyError, request_id: str) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an error response, for the fast path and for Quart. Logs 5xx."""
    if error.status >= 500:
        log.warning("%d %s: %s", error.status, error.code, error.message, extra={"request_id": request_id})
    return answer_of(error)


def internal_error(error: Exception) -> ProxyError:
    """Log an unexpected exception; the error for the client does not contain it."""
    log.error("A request failed inside the proxy", exc_info=error, extra={"request_id": request_id()})
    return ProxyError(_INTERNAL)


def error_response(error: ProxyError) -> Response:
    """An error as Quart's response."""
    status, headers, body = error_parts(error, request_id())
    return Response(body, status=status, headers={name.decode(): value.decode() for name, value in headers})


def json_response(value: Any, status: int = 200) -> Response:
    """Compact JSON."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(body, status=status, content_type="application/json")


def forwarded(answer: CompleteResponse) -> Response:
    """An engine's response to a route without KV transfer."""
    response = Response(answer.body, status=answer.status, content_type="application/json")
    for name, value in (*forwarded_response_headers(answer.headers, None), *retry_headers(answer.status)):
        response.headers[name.decode("latin-1")] = value.decode("latin-1")
    return response


def install_error_handlers(app: Quart) -> None:
    """Turn every exception of a handler into :func:`error_response`."""

    async def on_proxy_error(error: ProxyError) -> Response:
        return error_response(error)

    async def on_http_error(error: exceptions.HTTPException) -> Response:
        return error_response(_from_werkzeug(error, app.config["MAX_CONTENT_LENGTH"]))

    async def on_exception(error: Exception) -> Response:
        return error_response(internal_error(error))

    app.register_error_handler(ProxyError, on_proxy_error)
    app.register_error_handler(exceptions.HTTPException, on_http_error)
    app.register_error_handler(Exception, on_exception)


def _from_werkzeug(error: exceptions.HTTPException, max_body_bytes: int) -> ProxyError:
    if error.code == 404:
        return NotFound("There is no such path here.")
    if isinstance(error, exceptions.MethodNotAllowed):
        return MethodNotAllowed(list(error.valid_methods or ()))
    if error.code == 408:
        return BodyTimeout("The request body did not arrive in time (BODY_TIMEOUT).")
    if error.code == 413:
        return BodyTooLarge(f"The request body is longer than {max_body_bytes} bytes (MAX_BODY_BYTES).")
    if error.code is not None and error.code < 500:
        refusal = ClientError(error.description or error.name)
        refusal.status = error.code
        return refusal
    return ProxyError(_INTERNAL)
