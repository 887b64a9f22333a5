"""The command ``disagg-proxy``: runs the proxy, or passes the rest of the line to a subcommand.

Exit codes of the proxy: 0 stopped by signals, 1 a port is taken or no worker starts, 2 a bad setting or command.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from disagg_proxy.config import Config, ConfigError, load
from disagg_proxy.config.commands import COMMANDS, SERVE
from disagg_proxy.discovery.listener import BindError
from disagg_proxy.server.http_server import Server, listen, server_config
from disagg_proxy.services import Services
from disagg_proxy.telemetry.logs import configure_logging
from disagg_proxy.workers.supervisor import Supervisor

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy until SIGINT or SIGTERM, or the subcommand that the first word names.

    Args:
        argv: the words after the program's name; None for those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: after ``--help`` and ``--version``; from a subcommand also for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        command, argv = argv[0], argv[1:]
        if command in COMMANDS:
            return int(importlib.import_module(COMMANDS[command].module).main(argv))
        if command != SERVE:
            there = ", ".join((SERVE, *COMMANDS))
            print(f"disagg-proxy: no such command: {command!r}; commands: {there} (see --help)", file=sys.stderr)
            return 2
    return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        config = load(argv, os.environ)
    except ConfigError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 2
    configure_logging(config)
    # While the server does not handle signals, at start and at the end, SIGTERM acts like SIGINT.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if config.workers > 1:
            return asyncio.run(Supervisor(config, argv).run())
        listening = listen(config)
        services = Services(config)
    except BindError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _serve(config, services, listening)
    return 0


def _serve(config: Config, services: Services, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    log.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server = Server(server_config(config, services), services)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if not server.started:
        raise RuntimeError("the proxy did not start; its log has the cause")
