"""Requests to an idle engine, and their times. HTTP as of vLLM: /v1/models, /v1/completions, /metrics."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import aiohttp

_TOKEN_IDS = (10, 1000)
"""Range of the prompts' token ids; any model's vocabulary has them."""

_KV_SIZE = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.M)
_LOAD = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", re.M)

REPEATS = 7
"""Measurements of one figure at most; their median counts."""

OUTPUTS = (48, 192)
"""Tokens of the answers whose steps are measured; the second number where the first answers end too early."""

_ANSWER_SECONDS = 120.0

K = TypeVar("K")


class CalibrationError(Exception):
    """The engine cannot be measured; the text says why, and what to change."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the engine says of itself. kv_cache_tokens is 0 where /metrics do not show it."""

    model: str
    max_model_len: int
    version: str
    kv_cache_tokens: int


@dataclass(slots=True)
class Stream:
    """Times of one answer, by ``time.perf_counter``."""

    sent: float
    events: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0] - self.sent


class EngineClient:
    """One server.

    Args:
        url: ``http://host:port`` of an engine or of a proxy.
        model: served name; empty: the first one.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str = "", seed: int = 0) -> None:
        self._session = session
        self.url = url.rstrip("/")
        self._model = model
        self._dice = random.Random(seed)

    async def facts(self) -> Facts:
        """Read what the engine says of itself.

        Raises:
            CalibrationError: it does not answer as vLLM does, or does not serve the model.
        """
        try:
            found: Any = json.loads(await self._get("/v1/models"))
            models = {one["id"]: one for one in found["data"]}
        except (ValueError, LookupError, TypeError):
            raise CalibrationError(f"{self.url}: /v1/models is not that of vLLM") from None
        self._model = self._model or next(iter(models), "")
        if self._model not in models:
            raise CalibrationError(
                f"{self.url} does not serve {self._model!r} but {', '.join(models) or 'nothing'} (--model)"
            )
        length = int(models[self._model].get("max_model_len") or 0)
        metrics = await self._get("/metrics", optional=True)
        if sum(float(value) for value in _LOAD.findall(metrics)):
            raise CalibrationError(f"{self.url} serves other requests; calibrate an idle engine")
        try:
            version = str(json.loads(await self._get("/version", optional=True) or "{}").get("version", ""))
        except (ValueError, AttributeError):
            version = ""
        return Facts(self._model, length, version, _kv_tokens(metrics))

    async def _get(self, path: str, *, optional: bool = False) -> str:
        try:
            async with self._session.get(self.url + path) as response:
                text = await response.text()
                if response.status == 200:
                    return text
                if optional:
                    return ""
                raise CalibrationError(f"{self.url}{path}: {_refusal(response.status, text)}")
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            raise CalibrationError(f"{self.url}: no answer ({error or type(error).__name__})") from None

    async def stream(self, tokens: int, output: int) -> Stream:
        """One request with a prompt that no cache has.

        Raises:
            CalibrationError: it was not answered completely.
        """
        prompt = [self._dice.randrange(*_TOKEN_IDS) for _ in range(tokens)]
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        found, partial = Stream(time.perf_counter()), b""
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise CalibrationError(f"{self.url}: {_refusal(response.status, await response.text())}")
                async for chunk in response.content.iter_any():
                    now = time.perf_counter()
                    *lines, partial = (partial + chunk).split(b"\n")
                    found.events += [now] * sum(b'"choices"' in line for line in lines)
                    if any(b'"error"' in line for line in lines):
                        raise CalibrationError(f"{self.url}: {b' '.join(lines).decode(errors='replace')[:200]}")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise CalibrationError(f"{self.url}: the answer broke off ({error or type(error).__name__})") from None
        if not found.events:
            raise CalibrationError(f"{self.url}: an answer without tokens")
        return found

    async def ttft(self, tokens: int) -> float:
        """Seconds to the first token of a prompt."""
        return (await self.stream(tokens, 1)).ttft

    async def step(self, sequences: int, context: int) -> float:
        """Seconds of a step while so many sequences run, each with about ``context`` tokens in the cache.

        Raises:
            CalibrationError: they never run at the same time, or are not answered.
        """
        for output in OUTPUTS:
            found = await self._step(sequences, context, output)
            if found is not None:
                return found
        raise CalibrationError(
            f"{self.url}: {sequences} requests never ran at the same time; a max_num_seqs of {sequences} is needed"
        )

    async def _step(self, sequences: int, context: int, output: int) -> float | None:
        streams = await asyncio.gather(*(self.stream(max(1, context - output // 2), output) for _ in range(sequences)))
        # Only while all of them run: neither with prompts of the later ones nor after the end of the first.
        begin, end = max(one.events[0] for one in streams), min(one.events[-1] for one in streams)
        gaps = []
        for one in streams:
            inside = [at for at in one.events if begin <= at <= end]
            if len(inside) > 2:
                gaps.append((inside[-1] - inside[0]) / (len(inside) - 1))
        return median(gaps) if gaps else None


def _refusal(status: int, text: str) -> str:
    if status in (401, 403):
        return f"answers {status}: set VLLM_API_KEY to its key"
    return f"answers {status}: {text[:200]}"


def _kv_tokens(metrics: str) -> int:
    found = _KV_SIZE.search(metrics)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}
    try:
        if labels.get("kv_cache_size_tokens", "None") != "None":
            return int(labels["kv_cache_size_tokens"])
        return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    except (KeyError, ValueError):
        return 0


async def medians(
    points: Sequence[K], measure: Callable[[K], Awaitable[float]], seconds: float, progress: Callable[[str], None]
) -> Mapping[K, float]:
    """Measure every point once, and again in turn until ``seconds`` are over. Returns the medians."""
    found: dict[K, list[float]] = {point: [] for point in points}
    begun = time.perf_counter()
    for repeat in range(REPEATS):
        for point in points:
            if repeat and time.perf_counter() - begun > seconds:
                break
            found[point].append(await measure(point))
        progress(f"{min(map(len, found.values()))} of {REPEATS}")
    return {point: median(values) for point, values in found.items()}


def timeout() -> aiohttp.ClientTimeout:
    """For sessions of this module."""
    return aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_ANSWER_SECONDS)
