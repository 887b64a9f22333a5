"""Headers and body of Quart's current request, as bytes. A module of its own because it is compiled (setup.py)."""

from __future__ import annotations

from typing import Any, cast

from quart import request

from disagg_proxy.http1.headers import Headers
from disagg_proxy.server.request_head import check_encoding


def request_headers() -> Headers:
    """The headers as received; uvicorn has converted the names to lower case."""
    return cast(Headers, request.scope["headers"])


REQUEST_ID = "disagg_proxy.request_id"
"""Key in the ASGI scope of the X-Request-Id, which the connection sends with the response."""


def scope_request_id(scope: Any) -> str:
    """The X-Request-Id of an exchange: the client's own, or else a new one."""
    return cast(str, scope[REQUEST_ID])


def request_id() -> str:
    """The X-Request-Id of the current request's response."""
    return scope_request_id(request.scope)


SEND_CONTINUE = "disagg_proxy.send_continue"
"""Key in the ASGI scope of a function that sends 100 (Continue); missing if the client does not wait for it."""


async def read_body() -> bytes:
    """The complete body. A client that waits for 100 (Continue) gets it here, unless the body will be too long.

    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    check_encoding(request_headers())
    send_continue = cast(dict[str, Any], request.scope).get(SEND_CONTINUE)
    if send_continue is not None and (request.content_length or 0) <= (request.max_content_length or 0):
        send_continue()
    return cast(bytes, await request.get_data(cache=False, as_text=False))
