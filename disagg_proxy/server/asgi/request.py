"""What Quart knows of the present request, in the bytes of the wire."""

from __future__ import annotations

from typing import cast

from quart import request

from disagg_proxy.http1.headers import Headers
from disagg_proxy.server.generation import check_encoding


def request_headers() -> Headers:
    """As the client sent them; uvicorn has put the names in lower case."""
    return cast(Headers, request.scope["headers"])


async def read_body() -> bytes:
    """The whole body.

    Raises:
        UnsupportedEncoding: it is compressed.
    """
    check_encoding(request_headers())
    return cast(bytes, await request.get_data(cache=False, as_text=False))
