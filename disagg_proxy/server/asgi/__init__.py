"""The Quart application: the only package that knows Quart's request and response."""

from disagg_proxy.server.asgi.app import create_app

__all__ = ["create_app"]
