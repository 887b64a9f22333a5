"""Engines as far as a choice can make a difference: queues, prefix caches, transfers, decode steps.

Constants are those of a 4B model (Qwen3-4B shape, bf16) on an H200. Measured (docs/gpu-results.md, vLLM 0.21): TTFT of
a plain engine 24-28 ms at 1,000 tokens and 139 ms at 8,000; prefill first 160 ms at 8,000, of which the transfer of
1.18 GB is what it takes more; 1.1 s for the first request of a pair. Calculated: what a token costs more the longer
its context is (4 x 36 layers x 4096 operations per token of context against 2 x 3.65e9); a decode step's floor and
slope from reading 8 GB of weights and 147,456 bytes of KV per token at 3.5 TB/s, and 5 ms for everything else.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bench.virtual.cache import TokenCache
from disagg_sim.step_model import EngineProfile

CACHE = 262_144
"""Tokens in a prefill's prefix cache: 38 GB for this model, or a larger model on the same GPU."""

COMMUNICATOR = 1.1
"""Seconds, once for each pair."""

PREFILL = EngineProfile(
    name="4B model on an H200, prefill", source="docs/gpu-results.md, vLLM 0.21", step_seconds=4e-3,
    connector_step_seconds=0.0, mixed_step_seconds=0.0, prefill_token_seconds=12.3e-6, prefill_context_tokens=12_400,
    sequence_seconds=20e-6, context_token_seconds=42e-9, load_seconds=0.0, hand_over_seconds=0.0,
    hand_over_tokens_per_second=60e9 / 147_456, request_seconds=6e-3, delivery_seconds=0.0, kv_cache_tokens=700_000,
)  # fmt: skip
"""60e9 bytes a second from one prefill, P2pNcclConnector end to end."""

DECODE = replace(PREFILL, name="4B model on an H200, decode", step_seconds=7e-3)


@dataclass(eq=False, slots=True)
class Job:
    """One request on the engines.

    Attributes:
        blocks: names of the prompt's blocks, each of ``block`` tokens but for the last; tokens, output: lengths.
        hits: tokens found in the prefill's cache.
    """

    blocks: tuple[int, ...]
    block: int
    tokens: int
    output: int
    hits: int = 0
    left: int = -1
    done_prefill: Callable[[], None] = field(default=lambda: None)
    first_token: Callable[[], None] = field(default=lambda: None)
    done: Callable[[], None] = field(default=lambda: None)


class Prefill:
    """First come, first served, in chunks; least recently used blocks go first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cache: int) -> None:
        self._loop = loop
        self._cache = TokenCache(cache)
        self._queue: deque[Job] = deque()
        self._running = False
        self._link_free = 0.0
        self._met: set[object] = set()
        self.busy = 0.0
        self.computed = 0

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        if not self._running:
            self._running = True
            self._loop.call_soon(self._step)

    def restart(self) -> None:
        """Restart: an empty cache and no connections."""
        self._cache.clear()
        self._met.clear()

    def send(self, job: Job, decode: Decode) -> None:
        """KV goes to decode, one prompt after another; the job is decode's from then on."""
        begin = max(self._loop.time(), self._link_free)
        if decode not in self._met:
            self._met.add(decode)
            begin += COMMUNICATOR
        self._link_free = begin + PREFILL.hand_over(job.tokens)
        self._loop.call_at(self._link_free, decode.submit, job)

    def _step(self) -> None:
        if not self._queue:
            self._running = False
            return
        room, chunks, ready = PREFILL.max_num_batched_tokens, [], []
        for job in self._queue:
            if job.left < 0:
                self._look_up(job)
            part = min(room, job.left)
            chunks.append((part, job.tokens - job.left))
            job.left -= part
            room -= part
            self.computed += part
            if job.left == 0:
                ready.append(job)
            if not room:
                break
        seconds = PREFILL.step(chunks, 0, 0)
        self.busy += seconds
        self._loop.call_later(seconds, self._ended, ready)

    def _ended(self, ready: list[Job]) -> None:
        for job in ready:
            self._queue.remove(job)
            self._cache.remember(job.blocks, job.block)
            self._loop.call_later(PREFILL.request_seconds, job.done_prefill)
        self._step()

    def _look_up(self, job: Job) -> None:
        job.hits = self._cache.hits(job.blocks, job.block, job.tokens)
        job.left = job.tokens - job.hits


class Decode:
    """One batch; each step generates a token for every request in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Job] = deque()
        self._ends: list[tuple[int, int, Job]] = []
        self._steps = 0
        self._order = 0
        self._context = 0
        self._running = False
        self.gaps: list[tuple[float, float, int]] = []
        """When each step began, its seconds, and the sequences that had to wait for it."""
        self.tokens = 0

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        if not self._running:
            self._running = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        joined = []
        before = len(self._ends)
        while self._waiting and len(self._ends) < DECODE.max_num_seqs:
            job = self._waiting[0]
            if self._ends and self._context + job.tokens > DECODE.kv_cache_tokens:
                break
            self._waiting.popleft()
            self._order += 1
            self._context += job.tokens
            heapq.heappush(self._ends, (self._steps + job.output, self._order, job))
            joined.append(job)
        count = len(self._ends)
        if not count:
            self._running = False
            return
        seconds = DECODE.step((), count, self._context)
        if before:
            self.gaps.append((self._loop.time(), seconds, before))
        self._loop.call_later(seconds, self._ended, joined)

    def _ended(self, joined: list[Job]) -> None:
        self._steps += 1
        count = len(self._ends)
        self.tokens += count
        self._context += count
        for job in joined:
            job.first_token()
        while self._ends and self._ends[0][0] <= self._steps:
            job = heapq.heappop(self._ends)[2]
            self._context -= job.tokens + job.output
            job.done()
        self._step()
