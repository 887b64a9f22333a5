"""Requests to the proxies: what they see of the engines, drains, and the figures for scaling.

With the standard library, off the data path. An unreachable proxy counts as one that has nothing to say.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from disagg_ray import keys

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Never through a proxy for the internet."""


def request(method: str, url: str, key: str = "", seconds: float = 5.0) -> tuple[int, Any]:
    """Status and decoded JSON of one request; status 0 when no answer came, None for a body that is no JSON."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    sent = urllib.request.Request(url, method=method, headers=headers)
    try:
        with _DIRECT.open(sent, timeout=seconds) as answer:
            status, body = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, body = error.code, error.read()
    except (OSError, ValueError, EOFError):
        return 0, None
    with contextlib.suppress(ValueError):
        return status, json.loads(body)
    return status, None


def get_text(url: str, key: str, seconds: float = 5.0) -> str:
    """The body of a GET; empty where it is not answered with 200."""
    try:
        sent = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        with _DIRECT.open(sent, timeout=seconds) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError, EOFError):
        return ""


@dataclass(frozen=True)
class Proxies:
    """The proxies of one cluster.

    Attributes:
        urls: of each, without a path.
        admin_key, monitoring_key: see :mod:`disagg_ray.keys`.
    """

    urls: Sequence[str]
    admin_key: str
    monitoring_key: str

    @classmethod
    def of(cls, addresses: Iterable[str], secret: str) -> Proxies:
        """The proxies at these addresses, each ``HOST:PORT``."""
        urls = [f"http://{address}" for address in addresses]
        return cls(urls, keys.derived(secret, keys.ADMIN), keys.derived(secret, keys.MONITORING))

    def instances(self) -> dict[str, list[dict[str, Any]] | None]:
        """The engines as each proxy sees them, by its URL; None where it does not answer."""
        return {
            url: body["instances"] if status == 200 else None
            for url, (status, body) in self._all("GET", "/admin/instances", self.admin_key).items()
        }

    def drain(self, instance: str, seconds: float) -> bool:
        """Take an engine out at every proxy, and wait until its requests have ended.

        Returns:
            Whether it is idle at every proxy that answers and knows it.
        """
        query = urllib.parse.urlencode({"instance": instance})
        # All stop sending first; then each may take all of the time.
        self._all("POST", f"/admin/drain?{query}", self.admin_key)
        deadline = time.monotonic() + seconds
        while True:
            answers = self._all("POST", f"/admin/drain?{query}", self.admin_key)
            if all(body["idle"] for status, body in answers.values() if status == 200):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            wait = min(30.0, left)
            self._all("POST", f"/admin/drain?{query}&wait={wait:.1f}", self.admin_key, wait + 5)

    def undrain(self, instance: str) -> None:
        """Give an engine requests again, wherever it is known."""
        self._all("POST", f"/admin/undrain?{urllib.parse.urlencode({'instance': instance})}", self.admin_key)

    def _all(self, method: str, path: str, key: str, seconds: float = 5.0) -> Mapping[str, tuple[int, Any]]:
        with ThreadPoolExecutor(max(1, len(self.urls))) as pool:
            answers = pool.map(lambda url: request(method, url + path, key, seconds), self.urls)
            return dict(zip(self.urls, answers, strict=True))
