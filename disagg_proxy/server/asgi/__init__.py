"""The Quart application, the only package that uses Quart: routes, authentication and error responses."""

from disagg_proxy.server.asgi.app import create_app

__all__ = ["create_app"]
