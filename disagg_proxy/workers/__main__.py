"""Entry point of a worker process. The supervisor starts it; users run ``disagg-proxy serve --workers N``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from functools import partial

from disagg_proxy.config import ConfigError, check_keys_file
from disagg_proxy.config.reload import LiveSettings
from disagg_proxy.server.http_server import server_config
from disagg_proxy.services import Services
from disagg_proxy.telemetry.logs import configure_logging
from disagg_proxy.workers.worker_peers import WorkerPeers
from disagg_proxy.workers.worker_process import WorkerEnv
from disagg_proxy.workers.worker_server import WorkerServer


def main() -> int:
    """Serve until the supervisor or a signal ends the worker. Returns the exit code."""
    try:
        env = WorkerEnv.read(os.environ)
    except KeyError:
        print("disagg-proxy: workers are started by: python -m disagg_proxy --workers N", file=sys.stderr)
        return 2
    try:
        settings = LiveSettings(sys.argv[1:], os.environ, env.settings)
        check_keys_file(settings.config)
    except ConfigError as error:
        # The file of keys may have changed since the supervisor read it.
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 2
    configure_logging(settings.config, env.worker)
    # The supervisor gets it and sends what has changed; a terminal that closes reaches no worker.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Before the server installs its signal handlers, and after it has removed them, SIGTERM acts like SIGINT.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    peers = WorkerPeers(env)
    services = Services(settings.config, peers=peers)
    services.reloads.on_config(partial(configure_logging, worker=env.worker))
    peers.on_settings = lambda file: services.reloads.run(settings.use(file))
    server = WorkerServer(
        server_config(settings.config, services), services, socket.socket(fileno=env.listening), peers
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
