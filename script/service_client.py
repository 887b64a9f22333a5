"""The few HTTP questions that `test` and `bench` put to the proxy, with the standard library alone.

Environment: API_KEY, sent as Authorization: Bearer. System-wide HTTP proxies are never used.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, cast

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(Exception):
    """A request did not bring what was asked for; the text says why, in one line."""


class Silent(Failed):
    """Nothing came for the time that a request may be silent."""


@dataclass
class Answer:
    """What came back: the text, seconds until all of it and until its first piece, and completion tokens."""

    text: str
    seconds: float
    first: float
    tokens: int


class Service:
    """One proxy; ``timeout``: seconds of silence after which a request has failed."""

    def __init__(self, url: str, timeout: float = 300.0) -> None:
        self.url = url
        self.timeout = timeout

    def _open(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("API_KEY"):
            headers["Authorization"] = "Bearer " + os.environ["API_KEY"]
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            return cast(HTTPResponse, _OPENER.open(request, timeout=self.timeout))
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

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that a path answers; :class:`Failed` when it does not."""
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
        instances = self.json("/stats").get("instances", [])
        return {f"{i['role']} {i['http_address']}": int(i["requests_total"]) for i in instances}

    def whole(self, path: str, body: dict[str, Any]) -> Answer:
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

    def stream(self, path: str, body: dict[str, Any]) -> Answer:
        """A streamed request; it must end with ``[DONE]``."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        first = 0.0
        pieces: list[str] = []
        tokens, done = 0, False
        with self._open(path, body) as response:
            try:
                for raw in response:
                    line = raw.strip()
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        done = True
                        break
                    chunk = json.loads(data)
                    if chunk.get("usage"):
                        tokens = int(chunk["usage"]["completion_tokens"])
                    for choice in chunk.get("choices", ()):
                        first = first or time.perf_counter() - start
                        pieces.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
            except (ValueError, TypeError, KeyError, OSError, HTTPException) as error:
                raise self._failure(error) from None
        if not done:
            raise Failed("the stream ended without [DONE]")
        if tokens < 1:
            raise Failed("the stream has no tokens")
        return Answer("".join(pieces), time.perf_counter() - start, first, tokens)
