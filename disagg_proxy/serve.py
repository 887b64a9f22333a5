"""The proxy as a process: settings, log, listening socket, signals; apart from the command, whose others start faster.

SIGHUP reloads the configuration file (config/reload.py). A terminal that closes sends it too, so it never ends the
proxy: it is ignored before and after the server handles it, and a log that cannot be written any more is dropped.

Exit codes: 0 stopped by signals, 1 a port is taken or no worker starts, 2 a bad setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from disagg_proxy.config import ConfigError, check_keys_file
from disagg_proxy.config.reload import LiveSettings
from disagg_proxy.connectors.table import check_instances
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.server.http_server import Server, listen, server_config
from disagg_proxy.services import Services
from disagg_proxy.telemetry.logs import configure_logging
from disagg_proxy.workers.supervisor import Supervisor

log = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Run the proxy with these flags until SIGINT or SIGTERM, and return the exit code."""
    try:
        return _run(argv)
    finally:
        _forget_lost_terminal()


def _run(argv: Sequence[str]) -> int:
    try:
        settings = LiveSettings(argv, os.environ)
        check_instances(settings.config)
        check_keys_file(settings.config)
    except ConfigError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 2
    config = settings.config
    configure_logging(config)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Before the server takes signals over, and after it has given them back, SIGTERM too is an interrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if config.workers > 1:
            return asyncio.run(Supervisor(settings, argv).run())
        listening = listen(config)
        services = Services(config)
    except BindError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _serve(settings, services, listening)
    return 0


def _serve(settings: LiveSettings, services: Services, listening: socket.socket) -> None:
    services.reloads.on_config(configure_logging)

    def reload() -> None:
        settings.reload(lambda: services.reloads.run(settings.config))

    host, port = listening.getsockname()[:2]
    log.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server = Server(server_config(settings.config, services), services, reload)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if not server.started:
        raise RuntimeError("the proxy did not start; its log has the cause")


def _forget_lost_terminal() -> None:
    """Python ends with code 120 if it cannot write what is left for a terminal or a pipe that is closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
