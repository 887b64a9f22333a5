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
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

TOKEN = 12.3e-6
"""Seconds to prefill a token without context."""

CONTEXT = 12_400
"""Tokens of context that make a prefilled token cost twice as much."""

STEP = 4e-3
"""Seconds that a prefill step takes beside its tokens."""

LATENCY = 6e-3
"""Seconds that a request takes in front of and behind the engine's step, while others compute."""

BATCHED = 8192
"""Prompt tokens of one prefill step (max_num_batched_tokens)."""

CACHE = 262_144
"""Tokens in a prefill's prefix cache: 38 GB for this model, or a larger model on the same GPU."""

KV_BYTES = 147_456
BANDWIDTH = 60e9
"""Bytes a second from one prefill, P2pNcclConnector end to end."""

COMMUNICATOR = 1.1
"""Seconds, once for each pair."""

DECODE_STEP = 7e-3
DECODE_SEQUENCE = 20e-6
DECODE_TOKEN = 42e-9
"""Seconds of a decode step: at least, for each sequence, and for each token of context."""

SEQUENCES = 256
HELD = 700_000
"""Sequences, and tokens of context, that a decode runs at once; others wait."""


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
        self._room = cache
        self._cache: OrderedDict[int, int] = OrderedDict()
        self._held = 0
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
        self._held = 0
        self._met.clear()

    def send(self, job: Job, decode: Decode) -> None:
        """KV goes to decode, one prompt after another; the job is decode's from then on."""
        begin = max(self._loop.time(), self._link_free)
        if decode not in self._met:
            self._met.add(decode)
            begin += COMMUNICATOR
        self._link_free = begin + job.tokens * KV_BYTES / BANDWIDTH
        self._loop.call_at(self._link_free, decode.submit, job)

    def _step(self) -> None:
        if not self._queue:
            self._running = False
            return
        room, seconds, ready = BATCHED, STEP, []
        for job in self._queue:
            if job.left < 0:
                self._look_up(job)
            part = min(room, job.left)
            context = job.tokens - job.left
            seconds += part * TOKEN * (1 + (context + part / 2) / CONTEXT)
            job.left -= part
            room -= part
            self.computed += part
            if job.left == 0:
                ready.append(job)
            if not room:
                break
        self.busy += seconds
        self._loop.call_later(seconds, self._ended, ready)

    def _ended(self, ready: list[Job]) -> None:
        for job in ready:
            self._queue.remove(job)
            self._remember(job)
            self._loop.call_later(LATENCY, job.done_prefill)
        self._step()

    def _look_up(self, job: Job) -> None:
        hits = 0
        for block in job.blocks:
            if block not in self._cache:
                break
            hits += job.block
        # As in vLLM the last token is always computed.
        job.hits = min(hits, max(0, job.tokens - 1))
        job.left = job.tokens - job.hits

    def _remember(self, job: Job) -> None:
        # Deepest first, so that the beginning is the last to go.
        for block in reversed(job.blocks):
            if block not in self._cache:
                self._held += job.block
            self._cache[block] = job.block
            self._cache.move_to_end(block)
        while self._held > self._room:
            self._held -= self._cache.popitem(last=False)[1]


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
        while self._waiting and len(self._ends) < SEQUENCES:
            job = self._waiting[0]
            if self._ends and self._context + job.tokens > HELD:
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
        seconds = DECODE_STEP + DECODE_SEQUENCE * count + DECODE_TOKEN * self._context
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
