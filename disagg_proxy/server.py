"""The HTTP server around the application: which socket, which ASGI server. Reasons: docs/server.md."""

from __future__ import annotations

import logging
import resource
import socket

import uvicorn

from disagg_proxy.config import Config
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.http import create_app
from disagg_proxy.http.wire import protocol
from disagg_proxy.services import Services

_BACKLOG = 2048

_KEEP_ALIVE = 75
"""Seconds an idle client connection is kept; longer than the pools of common clients, so that they close first."""


def listen(config: Config) -> socket.socket:
    """The HTTP socket, bound and listening before anything else starts.

    Raises:
        BindError: it cannot be bound.
    """
    host, port = config.http_host, config.http_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; uvloop always does.
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise BindError(
            f"cannot listen for clients on {host}:{port} (HTTP_PROXY_HOST, HTTP_PROXY_PORT): {error}"
        ) from None
    return listening


def _raise_file_limit() -> None:
    """Allow this process as many connections as the system lets it have without asking."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        # Some systems refuse what they have named as their own limit; the one in force remains.
        pass


def server_config(config: Config, services: Services) -> uvicorn.Config:
    """uvicorn on uvloop and httptools, with the application of ``services``."""
    _raise_file_limit()
    return uvicorn.Config(
        create_app(config, services),
        loop="uvloop",
        http=protocol(config),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level=max(logging.WARNING, logging.getLevelName(config.log_level.upper())),
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(config.shutdown_grace)),
        backlog=_BACKLOG,
    )
