"""Who may call: the API key, the operator's own key, and the browser origins."""

from __future__ import annotations

import hmac

from quart import Quart, request
from quart_cors import cors

from disagg_proxy.config import Config
from disagg_proxy.errors import WrongKey
from disagg_proxy.http1.headers import Headers, value_of
from disagg_proxy.server.asgi.request import request_headers

ADMIN = "/admin/"
"""What the admin key opens, and nothing else does."""

_OPEN_PATHS = frozenset({"/health", "/", "/dashboard"})
"""The page holds no data: what it shows comes from a path that asks for the key."""


class KeyCheck:
    """The rule itself."""

    def __init__(self, config: Config) -> None:
        self._api_key = config.api_key.encode()
        self._admin_key = config.admin_key.encode()

    def check(self, path: str, headers: Headers) -> None:
        """
        Raises:
            WrongKey: the path is not for who sends these headers.
        """
        admin = bool(self._admin_key) and path.startswith(ADMIN)
        expected = self._admin_key if admin else self._api_key
        if expected and path not in _OPEN_PATHS and not hmac.compare_digest(_given_key(path, headers), expected):
            which = "admin" if admin else "API"
            raise WrongKey(f"The {which} key is missing or wrong; send it as Authorization: Bearer KEY.")


def install_guard(app: Quart, config: Config) -> Quart:
    """Check the key before every handler, and answer browsers' preflights, which carry none."""
    if config.api_key or config.admin_key:
        guard = KeyCheck(config)

        @app.before_request
        async def check_key() -> None:
            if request.method != "OPTIONS":
                guard.check(request.path, request_headers())

    if config.cors_origins:
        app = cors(
            app,
            allow_origin=list(config.cors_origins),
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _given_key(path: str, headers: Headers) -> bytes:
    """The bearer token; on Anthropic's route also its client's own header."""
    scheme, _, token = value_of(headers, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer" and token:
        return token.strip()
    return value_of(headers, b"x-api-key") if path.startswith("/v1/messages") else b""
