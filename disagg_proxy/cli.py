"""The command: settings in, a running proxy out.

Exit codes: 0 stopped by a signal, 1 a port is taken, 2 a bad setting.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence

import uvicorn

from disagg_proxy.config import Config, ConfigError, load
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.http import create_app
from disagg_proxy.logs import configure_logging
from disagg_proxy.services import Services

log = logging.getLogger(__name__)

_BACKLOG = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy until SIGINT or SIGTERM; returns the exit code."""
    try:
        config = load(sys.argv[1:] if argv is None else argv, os.environ)
    except ConfigError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 2
    configure_logging(config)
    try:
        listening = _listen(config)
        services = Services(config)
    except BindError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 1
    try:
        _serve(config, services, listening)
    except KeyboardInterrupt:
        pass
    return 0


def _listen(config: Config) -> socket.socket:
    """The HTTP socket, bound before anything else starts.

    Raises:
        BindError: it cannot be bound.
    """
    host, port = config.http_host, config.http_port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
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


def _serve(config: Config, services: Services, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    log.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(config, services),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            log_level=max(logging.WARNING, logging.getLevelName(config.log_level.upper())),
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(config.shutdown_grace) or 1,
            backlog=_BACKLOG,
        )
    )
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if not server.started:
        raise RuntimeError("the proxy did not start; its log has the cause")
