"""Authentication: API keys, the operator's admin key, and the origins of browsers (CORS)."""

from __future__ import annotations

import hmac
from typing import Any, cast

from quart import Quart, Response, request
from quart_cors import cors

from disagg_proxy.admission.client_key import OPENAI_HEADERS, ClientKey
from disagg_proxy.config import Config
from disagg_proxy.errors import NotPermitted, WrongKey
from disagg_proxy.http1.headers import Headers, value_of
from disagg_proxy.keys.key_table import KeyTable
from disagg_proxy.server.asgi.request import request_headers

ADMIN = "/admin/"
"""Paths that need the admin key."""

_OPEN_PATHS = frozenset({"/health", "/livez", "/", "/dashboard"})
"""Paths without a key: for probes, which have none, and the page, which contains no data; its feed needs the key."""

MONITORING_PATHS = frozenset({"/stats", "/metrics", "/dashboard/events", "/start_profile", "/stop_profile"})
"""Paths that report or act on the requests of all clients; keys of API_KEYS_FILE need ``monitoring = true``."""

_CLIENT_KEY = "disagg_proxy.client_key"
_RATE_LIMIT = "disagg_proxy.rate_limit"
"""Keys in the ASGI scope: the client's key, and headers for the response that say what is left of its limits."""


class KeyCheck:
    """Checks the key of a request."""

    def __init__(self, config: Config, keys: KeyTable) -> None:
        self._api_key = config.api_key.encode()
        self._admin_key = config.admin_key.encode()
        self._keys = keys

    def check(self, path: str, headers: Headers) -> ClientKey | None:
        """The client's key; None without API_KEYS_FILE, and for paths that it does not apply to.

        Raises:
            WrongKey: the key for this path is missing or wrong.
            NotPermitted: the key is for the API only.
        """
        if path in _OPEN_PATHS:
            return None
        admin = bool(self._admin_key) and path.startswith(ADMIN)
        if self._keys.in_use and not admin:
            found = self._keys.find(_given_key(headers))
            if found is None:
                raise _wrong_key("API")
            # Quart also serves a path with a slash at its end.
            if not found.monitoring and path.rstrip("/") in MONITORING_PATHS:
                raise NotPermitted(f"This API key does not open {path}: it needs monitoring = true in API_KEYS_FILE.")
            return found
        expected = self._admin_key if admin else self._api_key
        if expected and not hmac.compare_digest(_given_key(headers), expected):
            raise _wrong_key("admin" if admin else "API")
        return None


def _wrong_key(which: str) -> WrongKey:
    return WrongKey(f"The {which} key is missing or wrong; send it as Authorization: Bearer KEY or X-Api-Key: KEY.")


def install_auth(app: Quart, config: Config, keys: KeyTable) -> Quart:
    """Check the key before every handler, except for preflight requests of browsers, which carry none."""
    key_check = KeyCheck(config, keys)

    @app.before_request
    async def authenticate() -> None:
        if request.method != "OPTIONS":
            _scope()[_CLIENT_KEY] = key_check.check(request.path, request_headers())

    @app.after_request
    async def add_rate_limit(response: Response) -> Response:
        for name, value in _scope().get(_RATE_LIMIT) or ():
            response.headers[name.decode()] = value.decode()
        return response

    if config.cors_origins:
        shown = [name.decode() for names in OPENAI_HEADERS.values() for name in names] if keys.in_use else []
        app = cors(
            app,
            allow_origin=list(config.cors_origins),
            expose_headers=["X-Request-Id", "Request-Id", "Retry-After", "X-Should-Retry", "X-Served-By", *shown],
        )
    return app


def client_key() -> ClientKey | None:
    """The key of Quart's current request; None without API_KEYS_FILE."""
    return cast("ClientKey | None", _scope().get(_CLIENT_KEY))


def show_rate_limit(headers: Headers | None) -> None:
    """Add ``headers`` to the response of Quart's current request, whatever it will be."""
    _scope()[_RATE_LIMIT] = headers


def _scope() -> dict[str, Any]:
    return cast(dict[str, Any], request.scope)


def _given_key(headers: Headers) -> bytes:
    """The bearer token, or the X-Api-Key that Anthropic's clients send."""
    scheme, _, token = value_of(headers, b"authorization").partition(b" ")
    if scheme.lower() == b"bearer" and token:
        return token.strip()
    return value_of(headers, b"x-api-key")
