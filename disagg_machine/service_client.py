"""The few HTTP requests that `test` and `bench --once` send to the proxy, with the standard library alone.

HTTP proxies of the system are never used: the service is on this machine.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, cast


class Failed(Exception):
    """A request that was not answered as it should be; the text says why, in one line."""


class Silent(Failed):
    """No byte arrived within the idle time-out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer.

    Attributes:
        seconds: until all of it.
        first: seconds until its first chunk.
        tokens: completion tokens, by its usage.
    """

    text: str
    seconds: float
    first: float
    tokens: int

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first one; None when there is only one."""
        return (self.seconds - self.first) / (self.tokens - 1) if self.tokens > 1 else None


class Service:
    """One proxy.

    Args:
        key: sent as a bearer token; empty for none.
        timeout: idle seconds after which a request fails.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 300.0) -> None:
        self.url = url
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            return cast(HTTPResponse, self._opener.open(request, timeout=self.timeout))
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(4000).decode("utf-8", "replace")
            raise Failed(f"HTTP {error.code}: {' '.join(text.split())}") from None
        except (OSError, HTTPException) as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> Failed:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            return Silent(f"no answer for {self.timeout:g} s")
        return Failed(f"{type(cause).__name__}: {cause}")

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that a path answers.

        Raises:
            Failed: it does not.
        """
        with self._open(path, body) as response:
            try:
                value = json.load(response)
            except (ValueError, OSError, HTTPException) as error:
                raise self._failure(error) from None
        if not isinstance(value, dict):
            raise Failed("the answer is not a JSON object")
        return value

    def model(self, wanted: str) -> str:
        """``wanted`` when it is served, else the first model that is."""
        try:
            names = [str(model["id"]) for model in self.json("/v1/models")["data"]]
            return wanted if wanted in names else names[0]
        except (KeyError, IndexError, TypeError):
            raise Failed("/v1/models names no model") from None

    def counts(self) -> dict[str, int]:
        """Requests so far of each instance, ``prefill 127.0.0.1:20003`` to a number."""
        try:
            instances = self.json("/stats")["instances"]
            return {f"{one['role']} {one['http_address']}": int(one["requests_total"]) for one in instances}
        except (KeyError, TypeError, ValueError):
            raise Failed("/stats names no instances") from None

    def whole(self, path: str, body: Mapping[str, Any]) -> Answer:
        """A request without stream."""
        start = time.perf_counter()
        value = self.json(path, body)
        seconds = time.perf_counter() - start
        try:
            choice = value["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
            tokens = int(value["usage"]["completion_tokens"])
        except (KeyError, IndexError, TypeError):
            raise Failed(f"not an answer: {json.dumps(value)[:300]}") from None
        if tokens < 1:
            raise Failed("the answer has no tokens")
        return Answer(text, seconds, seconds, tokens)

    def stream(self, path: str, body: Mapping[str, Any]) -> Answer:
        """A streamed request; it must end with ``[DONE]``."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        first = 0.0
        texts: list[str] = []
        tokens, done = 0, False
        with self._open(path, body) as response:
            try:
                for data in _events(response):
                    if data == b"[DONE]":
                        done = True
                        # A client that closes before the end of the body counts as one that left.
                        response.read()
                        break
                    chunk = json.loads(data)
                    if chunk.get("usage"):
                        tokens = int(chunk["usage"]["completion_tokens"])
                    for choice in chunk.get("choices", ()):
                        first = first or time.perf_counter() - start
                        texts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            except (AttributeError, ValueError, TypeError, KeyError, OSError, HTTPException) as error:
                raise self._failure(error) from None
        if not done:
            raise Failed("the stream ended without [DONE]")
        if tokens < 1:
            raise Failed("the stream has no tokens")
        return Answer("".join(texts), time.perf_counter() - start, first, tokens)


def _events(lines: Iterable[bytes]) -> Iterable[bytes]:
    """The data of server-sent events, one line each."""
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()
