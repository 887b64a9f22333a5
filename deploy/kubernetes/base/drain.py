"""Hooks of an engine's pod: `drain` before it is stopped, `undrain` when it starts. Standard library only.

Every proxy behind PROXY_SERVICE gets POST /admin/drain for this engine, all at once, and answers when nothing runs here
any more or after DRAIN_SECONDS. A proxy that does not know the engine (404), or has no ADMIN_KEY, has nothing to drain.
Exit code 1 where a proxy could not be asked to drain; Kubernetes then shows a FailedPreStopHook event and stops the
engine all the same. `undrain` never fails: its exit code would stop the container.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

CONNECT_SECONDS = 2.0


def target(action: str, environ: Mapping[str, str]) -> str:
    """The path of the request."""
    host = environ["POD_IP"]
    host = f"[{host}]" if ":" in host else host
    path = f"/admin/{action}?instance={host}:{environ.get('ENGINE_PORT') or 8000}"
    return f"{path}&wait={seconds(environ)}" if action == "drain" else path


def seconds(environ: Mapping[str, str]) -> int:
    """How long a proxy waits for the last request."""
    return int(environ.get("DRAIN_SECONDS") or 300)


def send(address: tuple[str, int], path: str, key: str, timeout: float) -> str:
    """Send one POST. Returns what went wrong, empty where nothing did."""
    connection = http.client.HTTPConnection(*address, timeout=CONNECT_SECONDS)
    with closing(connection):
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            connection.request("POST", path, headers={"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            body = response.read(1000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            return f"{address[0]}:{address[1]}: {type(error).__name__}: {error}"
    return "" if response.status in (200, 404) else f"{address[0]}:{address[1]}: {response.status} {body}"


def main(action: str, environ: Mapping[str, str]) -> int:
    """Send the request to every proxy; the exit code."""
    name, port = environ.get("PROXY_SERVICE") or "disagg-registration", int(environ.get("PROXY_HTTP_PORT") or 10001)
    try:
        key = Path(environ.get("ADMIN_KEY_FILE") or "/etc/disagg/admin-key").read_text().strip()
        found = {one[4][0] for one in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        print(f"{action}: {error}", file=sys.stderr)
        return int(action == "drain")
    path, timeout = target(action, environ), seconds(environ) + 5 if action == "drain" else 5
    with ThreadPoolExecutor(len(found)) as pool:
        failed = [text for text in pool.map(lambda host: send((host, port), path, key, timeout), sorted(found)) if text]
    for text in failed:
        print(f"{action}: {text}", file=sys.stderr)
    return int(action == "drain" and bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ))
