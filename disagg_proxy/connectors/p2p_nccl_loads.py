"""When a decode of P2pNcclConnector has loaded the KV of a request that shows nothing before its answer is complete.

The engine's own counters prove it: once the request has been received, a whole scheduler step of the engine has begun
and ended, and no request waited after it. Every request in the batch of a step loads its KV in that step (vLLM 0.9.2 -
0.23, ``p2p_nccl_connector.py``, ``start_load_kv``). Without counters (--disable-log-stats) only the answer proves it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import NamedTuple

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.connectors.base import Engines
from disagg_proxy.http1.head_writer import header_lines
from disagg_proxy.runtime.fixed_timeouts import FixedTimeouts
from disagg_proxy.upstream.engine_metrics import read_metrics

RECEIVED_AFTER = 0.1
SECONDS_PER_TOKEN = 1e-5
"""Seconds, and seconds per prompt token, after which a decode whose API server answers has passed a request on to its
engine. It tokenizes first, at most the prompts whose KV waits, about ten times as fast."""

POLL_INTERVAL = 0.1
"""Seconds between two requests for a decode's counters, while one of its legs is watched."""

_STEPS = re.compile(rb"^vllm:iteration_tokens_total_count(?:{.*})? (\S+)", re.MULTILINE)
_WAITING = re.compile(rb"^vllm:num_requests_waiting(?:{.*})? (\S+)", re.MULTILINE)


class StepStats(NamedTuple):
    """An engine's /metrics, as of the end of its last step (vLLM 0.9.2 - 0.23, ``v1/metrics/loggers.py``).

    Attributes:
        steps: scheduler steps so far. Of several engines behind one API server: of the one with the fewest.
        waiting: requests that were not in the batch of the last step.
    """

    steps: float
    waiting: float


def step_stats(metrics: bytes) -> StepStats | None:
    """The counters in the text of /metrics; None when they are missing."""
    steps, waiting = _STEPS.findall(metrics), _WAITING.findall(metrics)
    try:
        return StepStats(min(map(float, steps)), sum(map(float, waiting))) if steps and waiting else None
    except ValueError:
        return None


class WatchedLeg:
    """A decode leg whose KV may not be loaded yet."""

    __slots__ = ("decode", "loaded", "received_at", "steps", "timeout")

    def __init__(self, decode: Instance, loaded: Callable[[], None]) -> None:
        self.received_at = 0.0
        self.decode = decode
        self.loaded = loaded
        self.steps: float | None = None
        self.timeout = 0


class LoadWatch:
    """Calls back when the engine's counters prove that decode has loaded the KV of a leg."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        key = engines.config.engine_api_key
        self._headers = header_lines([(b"authorization", f"Bearer {key}".encode())] if key else [])
        self._timeouts = FixedTimeouts(RECEIVED_AFTER)
        self._watched: dict[Instance, dict[WatchedLeg, None]] = {}
        self._tasks: dict[Instance, asyncio.Task[None]] = {}

    def begin(self, decode: Instance, loaded: Callable[[], None]) -> WatchedLeg:
        """A leg is being sent to ``decode``. ``loaded`` is called once, unless :meth:`end` is called before."""
        leg = WatchedLeg(decode, loaded)
        leg.timeout = self._timeouts.add(lambda: self._watch(leg))
        return leg

    def end(self, leg: WatchedLeg) -> None:
        """The leg has ended, or its answer has begun. Further calls have no effect."""
        self._timeouts.drop(leg.timeout)
        watched = self._watched.get(leg.decode)
        if watched is None:
            return
        watched.pop(leg, None)
        if not watched:
            del self._watched[leg.decode]
            self._tasks.pop(leg.decode).cancel()

    def _watch(self, leg: WatchedLeg) -> None:
        watched = self._watched.setdefault(leg.decode, {})
        watched[leg] = None
        leg.received_at = self._engines.registry.now() + SECONDS_PER_TOKEN * leg.decode.kv_waiting_tokens
        if leg.decode not in self._tasks:
            name = f"KV loads of {leg.decode}"
            self._tasks[leg.decode] = asyncio.get_running_loop().create_task(self._poll(leg.decode, watched), name=name)

    async def _poll(self, decode: Instance, watched: dict[WatchedLeg, None]) -> None:
        """Until :meth:`end` has removed the last leg, which cancels this task."""
        while True:
            now = self._engines.registry.now()
            legs = [leg for leg in watched if leg.received_at <= now]
            stats = await self._stats(decode)
            if stats is not None:
                for leg in legs:
                    if leg in watched and _proves(leg, stats):
                        self._release(leg)
            await asyncio.sleep(POLL_INTERVAL)

    def _release(self, leg: WatchedLeg) -> None:
        # The end of the last leg cancels the task that runs this, at its next wait.
        self.end(leg)
        leg.loaded()

    async def _stats(self, decode: Instance) -> StepStats | None:
        metrics = await read_metrics(self._engines.upstream(), decode, self._headers)
        return None if metrics is None else step_stats(metrics)


def _proves(leg: WatchedLeg, stats: StepStats) -> bool:
    """Whether a step that began after ``leg`` was received has ended, with no request left waiting."""
    if leg.steps is None or stats.steps < leg.steps:
        # The step in progress may have been scheduled before.
        leg.steps = stats.steps
        return False
    return stats.steps >= leg.steps + 2 and not stats.waiting
