"""For HEALTHCHECK: exit code 0 when a URL answers 200. Slim images have no curl.

Without an argument the URL is the proxy's /livez, where HTTP_PROXY_HOST and HTTP_PROXY_PORT say; it needs no key.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 4.0


def url_of(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """What to ask for."""
    if argv:
        return argv[0]
    host = environ.get("HTTP_PROXY_HOST") or "0.0.0.0"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{environ.get('HTTP_PROXY_PORT') or 10001}/livez"


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code. No HTTP proxy of the environment is used."""
    url = urlsplit(url_of(argv, environ))
    try:
        with closing(http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_SECONDS)) as connection:
            connection.request("GET", url.path)
            with connection.getresponse() as response:
                status = response.status
    except (OSError, http.client.HTTPException) as error:
        print(f"{url.geturl()}: {type(error).__name__}: {error}")
        return 1
    print(f"{url.geturl()}: {status}")
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
