"""Load of one phase only, by threads of the standard library, and the engine's own counts of tokens."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_SAMPLE = re.compile(r"^([a-z_:]+)(?:\{(.*)\})? ([0-9.eE+-]+)$")
_FIRST_ID, _IDS = 100, 900
"""Token ids of prompts: every vocabulary has them, and random ones share no prefix."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Totals of an engine: prompt tokens that it computed itself, output tokens, answered requests."""

    prompt: float
    output: float
    requests: float


class Engine:
    """An OpenAI-compatible vLLM engine.

    Args:
        url: http://host:port.
    """

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"must be http://HOST:PORT, not {url!r}")
        self.host, self.port = parts.hostname, parts.port or 80
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def get(self, path: str, timeout: float = 5.0) -> bytes:
        """The body of a GET.

        Raises:
            OSError: no answer, or another status than 200.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path, headers=self._headers)
                response = connection.getresponse()
                body = response.read()
            except http.client.HTTPException as error:
                raise OSError(f"{path}: {error!r}") from None
        if response.status != 200:
            raise OSError(f"{path}: status {response.status}")
        return body

    def model(self) -> str:
        """The first served model."""
        return str(json.loads(self.get("/v1/models"))["data"][0]["id"])

    def tokens(self) -> Tokens:
        """The totals of /metrics now."""
        return totals(self.get("/metrics").decode("utf-8", "replace"))

    def complete(self, body: dict[str, Any], timeout: float) -> int:
        """Send one completion; the status."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            response.read()
            return response.status


def totals(text: str) -> Tokens:
    """Read vLLM's /metrics. Where it counts prompt tokens by source, only those it computed count."""
    sums: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        if name == "vllm:prompt_tokens_by_source_total":
            sums["by_source"] += 1
            sums["computed"] += value if 'source="local_compute"' in labels else 0.0
        else:
            sums[name] += value
    prompt = sums["computed"] if sums["by_source"] else sums["vllm:prompt_tokens_total"]
    return Tokens(prompt, sums["vllm:generation_tokens_total"], sums["vllm:request_success_total"])


class Load:
    """Requests from :meth:`start` to :meth:`stop`, ``at_once`` of them at a time."""

    def __init__(self, engine: Engine, model: str, at_once: int, prompt: int, output: int, seed: int = 7) -> None:
        self._engine, self._model = engine, model
        self._prompt, self._output = prompt, output
        self.statuses: Counter[str] = Counter()
        self._ended = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(at_once)]

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 20.0) -> None:
        """Send no more, and wait for the answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join(max(0.1, seconds / len(self._threads)))

    def _body(self) -> dict[str, Any]:
        with self._lock:
            ids = [_FIRST_ID + self._random.randrange(_IDS) for _ in range(self._prompt)]
        return {
            "model": self._model, "prompt": ids, "max_tokens": self._output, "ignore_eos": True, "temperature": 0.0,
        }  # fmt: skip

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.statuses[str(self._engine.complete(self._body(), 60.0))] += 1
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1
                self._ended.wait(0.5)
