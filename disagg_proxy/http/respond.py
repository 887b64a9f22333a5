"""Answers other than an engine's own: errors as OpenAI-style JSON, and an engine's whole answer passed on."""

from __future__ import annotations

import json
import logging
from typing import Any

from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from disagg_proxy.errors import (
    BodyTimeout,
    BodyTooLarge,
    ClientError,
    MethodNotAllowed,
    NotFound,
    ProxyError,
    headers_of,
)
from disagg_proxy.protocol.headers import answer_headers, client_request_id
from disagg_proxy.upstream import WholeAnswer

log = logging.getLogger(__name__)


def error_response(error: ProxyError) -> Response:
    """The one place where an error becomes a response."""
    if error.status >= 500:
        log.warning("%d %s: %s", error.status, error.code, error.message)
    headers = dict(headers_of(error))
    if (own_id := client_request_id(request.headers)) is not None:
        headers["X-Request-Id"] = own_id
    return Response(error.body(), status=error.status, headers=headers)


def json_response(value: Any, status: int = 200) -> Response:
    """Compact JSON."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(body, status=status, content_type="application/json")


def passed_on(answer: WholeAnswer) -> Response:
    """An engine's answer to a route that concerns no KV transfer."""
    response = Response(answer.body, status=answer.status, content_type="application/json")
    for name, value in answer_headers(answer.headers, None):
        if name.lower() != "content-length":
            response.headers[name] = value
    return response


def install_error_handlers(app: Quart, max_body_bytes: int) -> None:
    """Every failure of a handler ends in :func:`error_response`."""

    async def on_proxy_error(error: ProxyError) -> Response:
        return error_response(error)

    async def on_http_error(error: HTTPException) -> Response:
        return error_response(_from_werkzeug(error, max_body_bytes))

    async def on_bug(error: Exception) -> Response:
        log.exception("A request failed inside the proxy", exc_info=error)
        return error_response(ProxyError("The proxy failed; its log has the cause."))

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
