"""Headers and body of Quart's current request, as bytes. A module of its own because it is compiled (setup.py)."""

from __future__ import annotations

from typing import cast

from quart import request

from disagg_proxy.http1.headers import Headers
from disagg_proxy.server.request_head import check_encoding


def request_headers() -> Headers:
    """The headers as received; uvicorn has converted the names to lower case."""
    return cast(Headers, request.scope["headers"])


async def read_body() -> bytes:
    """The complete body.

    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    check_encoding(request_headers())
    return cast(bytes, await request.get_data(cache=False, as_text=False))
