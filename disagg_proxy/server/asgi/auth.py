"""Authentication: the API key, the operator's admin key, and the origins of browsers (CORS)."""

from __future__ import annotations

import hmac

from quart import Quart, request
from quart_cors import cors

from disagg_proxy.config import Config
from disagg_proxy.errors import WrongKey
from disagg_proxy.http1.headers import Headers, value_of
from disagg_proxy.server.asgi.request import request_headers

ADMIN = "/admin/"
"""Paths that need the admin key."""

_OPEN_PATHS = frozenset({"/health", "/livez", "/", "/dashboard"})
"""Paths without a key: for probes, which have none, and the page, which contains no data; its feed needs the key."""


class KeyCheck:
    """Checks the key of a request."""

    def __init__(self, config: Config) -> None:
        self._api_key = config.api_key.encode()
        self._admin_key = config.admin_key.encode()

    def check(self, path: str, headers: Headers) -> None:
        """
        Raises:
            WrongKey: the key for this path is missing or wrong.
        """
        admin = bool(self._admin_key) and path.startswith(ADMIN)
        expected = self._admin_key if admin else self._api_key
        if expected and path not in _OPEN_PATHS and not hmac.compare_digest(_given_key(headers), expected):
            which = "admin" if admin else "API"
            raise WrongKey(
                f"The {which} key is missing or wrong; send it as Authorization: Bearer KEY or X-Api-Key: KEY."
            )


def install_auth(app: Quart, config: Config) -> Quart:
    """Check the key before every handler, except for preflight requests of browsers, which carry none."""
    if config.api_key or config.admin_key:
        key_check = KeyCheck(config)

        @app.before_request
        async def authenticate() -> None:
            if request.method != "OPTIONS":
                key_check.check(request.path, request_headers())

    if config.cors_origins:
        app = cors(
            app,
            allow_origin=list(config.cors_origins),
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _given_key(headers: Headers) -> bytes:
    """The bearer token, or the X-Api-Key that Anthropic's clients send."""
    scheme, _, token = value_of(headers, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer" and token:
        return token.strip()
    return value_of(headers, b"x-api-key")
