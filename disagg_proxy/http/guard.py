"""Who may call: the API key, the operator's own key, and the browser origins."""

from __future__ import annotations

import hmac

from quart import Quart, request
from quart_cors import cors

from disagg_proxy.config import Config
from disagg_proxy.errors import WrongKey

ADMIN = "/admin/"
"""What the admin key opens, and nothing else does."""

_OPEN_PATHS = frozenset({"/health"})


def install_guard(app: Quart, config: Config) -> Quart:
    """Check the key before every handler, and answer browsers' preflights, which carry none."""
    if config.api_key or config.admin_key:

        @app.before_request
        async def check_key() -> None:
            if request.path in _OPEN_PATHS or request.method == "OPTIONS":
                return
            admin = bool(config.admin_key) and request.path.startswith(ADMIN)
            expected = (config.admin_key if admin else config.api_key).encode()
            given = _given_key().encode("utf-8", "surrogateescape")
            if expected and not hmac.compare_digest(given, expected):
                which = "admin" if admin else "API"
                raise WrongKey(f"The {which} key is missing or wrong; send it as Authorization: Bearer KEY.")

    if config.cors_origins:
        app = cors(
            app,
            allow_origin=list(config.cors_origins),
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _given_key() -> str:
    """The bearer token; on Anthropic's route also its client's own header."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return request.headers.get("X-Api-Key", "") if request.path.startswith("/v1/messages") else ""
