"""A worker's process. Only the supervisor starts it: ``python -m disagg_proxy --workers N``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from disagg_proxy.config import load
from disagg_proxy.server.http_server import server_config
from disagg_proxy.services import Services
from disagg_proxy.telemetry.logs import configure_logging
from disagg_proxy.workers.worker_env import WorkerEnv
from disagg_proxy.workers.worker_peers import WorkerPeers
from disagg_proxy.workers.worker_server import WorkerServer


def main() -> int:
    """Serve until the supervisor says otherwise, or a signal does; the exit code."""
    try:
        seat = WorkerEnv.read(os.environ)
    except KeyError:
        print("disagg-proxy: workers are started by: python -m disagg_proxy --workers N", file=sys.stderr)
        return 2
    config = load(sys.argv[1:], os.environ)
    configure_logging(config, seat.worker)
    # Before the server takes signals over, and after it has given them back, SIGTERM too is an interrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    member = WorkerPeers(seat)
    services = Services(config, peers=member)
    server = WorkerServer(server_config(config, services), services, socket.socket(fileno=seat.listening), member)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
