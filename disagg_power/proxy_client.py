"""What a running proxy says of energy and requests, read over HTTP with the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_SECONDS = 10.0


class NoProxy(Exception):
    """The proxy does not answer, or has not what was asked; the text says which."""


class ProxyClient:
    """One proxy.

    Args:
        url: with its path prefix if it has one.
        key: API key, empty for none.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise NoProxy(f"--url must look like http://127.0.0.1:10001, not {url!r}")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def energy(self) -> dict[str, Any]:
        """The object ``energy`` of /stats; empty where nothing reports a GPU.

        Raises:
            NoProxy: no answer.
        """
        with self._open("/stats") as answer:
            try:
                return dict(json.load(answer).get("energy") or {})
            except (ValueError, AttributeError):
                raise NoProxy(f"{self.url}/stats is not that of disagg-proxy") from None

    def recent(self) -> list[dict[str, Any]]:
        """The last requests that have ended, at most 256, oldest first (docs/observe.md).

        Raises:
            NoProxy: no answer, or a version without the live page.
        """
        with self._open("/dashboard/events") as answer:
            kind = b""
            for line in answer:
                if line.startswith(b"event: "):
                    kind = line[7:].strip()
                elif line.startswith(b"data: ") and kind == b"view":
                    return list(json.loads(line[6:])["recent"])
        raise NoProxy(f"{self.url} is stopping")

    def _open(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            why = "it requires its API key (--key, or API_KEY)" if error.code in (401, 403) else f"status {error.code}"
            raise NoProxy(f"{self.url}{path}: {why}") from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise NoProxy(f"{self.url} does not respond: {getattr(error, 'reason', error)}") from None
