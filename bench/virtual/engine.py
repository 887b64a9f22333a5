"""One vLLM engine on a virtual clock: batch, chunked prefill, KV cache, and KV from other engines (``disagg_kv``).

As vLLM 0.33 (``v1/core/sched/scheduler.py``): a step gives every running sequence a token and spends the rest of its
budget on prompts, oldest first; a prompt that finds no free KV waits, and with it all behind it; when running sequences
need more KV than there is, the newest one is preempted and its prompt computed again. A sequence whose KV comes from
another engine has its blocks before the transfer begins, and joins the batch after it. Computed KV that decode has not
requested may fill ``hold_fraction`` of prefill's cache; beyond it the newest is freed (docs/connector.md), and decode
computes that prompt itself.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.virtual.cache import TokenCache
from disagg_sim.step_model import EngineProfile

HOLD_FRACTION = 0.5
"""Default of the connector's ``hold_fraction``."""


def _nothing() -> None:
    pass


@dataclass(eq=False, slots=True)
class Sequence:
    """A request, or the prefill leg of one, on one engine.

    Args:
        blocks, block: names of the prompt's blocks, and tokens of a block. tokens: of the prompt. output: to generate.
        transfer: the KV that it gives (prefill) or takes (decode).
        first_token, done: called when they happen.

    Attributes:
        hits: prompt tokens found in the prefix cache.
        computed: prompt tokens computed, again after a preemption.
        generated: tokens so far.
        last_token: when the newest one before a preemption came.
        longest: seconds of the longest gap between two tokens, at the end.
    """

    blocks: tuple[int, ...]
    block: int
    tokens: int
    output: int
    transfer: Transfer | None = None
    first_token: Callable[[], None] = _nothing
    done: Callable[[], None] = _nothing
    hits: int = 0
    computed: int = 0
    generated: int = 0
    last_token: float = 0.0
    longest: float = 0.0
    first_step: int = 0
    left: int = -1
    ends: int = -1
    allocated: bool = False
    loaded: bool = False
    began: int = 0


@dataclass(eq=False, slots=True)
class Transfer:
    """KV of one prompt between two engines.

    Attributes:
        ready: prefill has computed it and holds it. wanted: decode has blocks for it. dropped: prefill has freed it
            unfetched. ended: loaded, or decode computes the prompt.
    """

    prefill: Engine
    decode: Engine
    tokens: int
    giver: Sequence | None = None
    taker: Sequence | None = None
    ready: bool = False
    wanted: bool = False
    dropped: bool = False
    ended: bool = False


class Engine:
    """One engine.

    Args:
        profile: the figures of its steps.
        connector: whether it has a KV connector.
        pace: seconds for each second that the profile says.

    Attributes:
        gaps: when each gap between tokens began, its seconds, and the sequences that waited for it.
        busy: seconds of steps. computed: prompt tokens computed.
        twice: prompts whose KV was dropped before decode fetched it. preempted: sequences, each time.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, profile: EngineProfile, *, connector: bool = True, pace: float = 1.0
    ) -> None:
        self._loop = loop
        self.profile = profile
        self._connector = connector
        self.pace = pace
        self._cache = TokenCache(profile.kv_cache_tokens)
        self._waiting: deque[Sequence] = deque()
        self._loading = 0
        self._prefilling: list[Sequence] = []
        self._running: list[tuple[int, int, Sequence]] = []
        self._count = 0
        self._context = 0
        self._joined: list[Sequence] = []
        self._used = 0
        self._held: dict[Transfer, None] = {}
        self._link_free = 0.0
        self._steps = 0
        self._order = 0
        self._active = False
        self._seconds: list[float] = []
        self.gaps: list[tuple[float, float, int]] = []
        self.busy = 0.0
        self.computed = self.twice = self.preempted = 0

    # What /metrics show.

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._count + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Sequences before it, those that load KV among them."""
        return len(self._waiting) + self._loading

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return min(1.0, self._used / self.profile.kv_cache_tokens)

    # Requests.

    def submit(self, sequence: Sequence) -> None:
        """A request arrives over HTTP."""
        self._loop.call_later(self.profile.request_seconds, self._arrive, sequence)

    def _arrive(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._wake()

    def _wake(self) -> None:
        if not self._active:
            self._active = True
            self._loop.call_soon(self._step)

    # One step.

    def _step(self) -> None:
        admits = not self._preempt()
        profile = self.profile
        budget = profile.max_num_batched_tokens - self._count
        chunks: list[tuple[int, int]] = []
        parts: list[tuple[Sequence, int]] = []
        for sequence in self._prefilling:
            budget = self._take(sequence, budget, chunks, parts)
        while admits and self._waiting and self.running < profile.max_num_seqs:
            sequence = self._waiting[0]
            needs = 0 if sequence.allocated else sequence.tokens + sequence.generated
            if self._used + needs > profile.kv_cache_tokens:
                break
            if self._begin_load(sequence):
                continue
            if budget <= 0:
                break
            self._waiting.popleft()
            self._allocate(sequence)
            if sequence.loaded:
                self._join(sequence)
                budget -= 1
                continue
            sequence.hits = self._cache.hits(sequence.blocks, sequence.block, sequence.tokens)
            sequence.left = sequence.tokens + sequence.generated - sequence.hits
            self._prefilling.append(sequence)
            budget = self._take(sequence, budget, chunks, parts)
        if not chunks and not self._count:
            self._active = False
            return
        seconds = self.pace * profile.step(
            chunks, self._count, self._context, len(self._joined), connector=self._connector
        )
        self.busy += seconds
        waited = self._count - len(self._joined)
        seen = seconds + (profile.delivery_seconds if chunks else 0.0)
        if waited:
            self.gaps.append((self._loop.time(), seen, waited))
        self._seconds.append(seen)
        self._loop.call_later(seconds, self._ended, parts)

    def _take(
        self, sequence: Sequence, budget: int, chunks: list[tuple[int, int]], parts: list[tuple[Sequence, int]]
    ) -> int:
        """Put a prompt, or a chunk of it, into the step. Returns what is left of the budget."""
        part = min(budget, sequence.left)
        if part > 0:
            chunks.append((part, sequence.tokens + sequence.generated - sequence.left))
            parts.append((sequence, part))
        return budget - part

    def _ended(self, parts: list[tuple[Sequence, int]]) -> None:
        now = self._loop.time()
        self._steps += 1
        self._context += self._count
        self._used += self._count
        joined, self._joined = self._joined, []
        for sequence in joined:
            sequence.first_step = self._steps
            sequence.first_token()
        while self._running and self._running[0][0] <= self._steps:
            ends, order, sequence = heapq.heappop(self._running)
            if (sequence.ends, sequence.began) == (ends, order):
                self._leave(sequence)
                steps = self._seconds[sequence.first_step : self._steps]
                sequence.longest = max(sequence.longest, *steps) if steps else sequence.longest
                sequence.done()
        for sequence, part in parts:
            sequence.left -= part
            sequence.computed += part
            self.computed += part
            if not sequence.left:
                self._prefilling.remove(sequence)
                self._cache.remember(sequence.blocks, sequence.block)
                self._prompt_complete(sequence, now)
        self._cache.size = max(0, self.profile.kv_cache_tokens - self._used)
        self._cache.trim()
        self._step()

    def _prompt_complete(self, sequence: Sequence, now: float) -> None:
        if sequence.generated:
            # Preempted before: its next token comes after this gap.
            gap = now - sequence.last_token
            self.gaps.append((sequence.last_token, gap, 1))
            sequence.longest = max(sequence.longest, gap)
        transfer = sequence.transfer
        if transfer is not None and transfer.prefill is self and transfer.giver is sequence:
            self._hold(transfer)
            sequence.first_token()
            sequence.done()
            return
        sequence.generated += 1
        self._used += 1
        late = self.profile.delivery_seconds
        if sequence.generated == 1:
            sequence.first_step = self._steps
            self._loop.call_later(late, sequence.first_token)
        if sequence.generated >= sequence.output:
            self._used -= sequence.tokens + sequence.generated
            sequence.allocated = False
            self._loop.call_later(late, sequence.done)
            return
        self._enter(sequence)

    # The batch.

    def _allocate(self, sequence: Sequence) -> None:
        if not sequence.allocated:
            sequence.allocated = True
            self._used += sequence.tokens + sequence.generated

    def _enter(self, sequence: Sequence) -> None:
        self._order += 1
        sequence.began = self._order
        sequence.ends = self._steps + sequence.output - sequence.generated
        heapq.heappush(self._running, (sequence.ends, self._order, sequence))
        self._count += 1
        self._context += sequence.tokens + sequence.generated

    def _leave(self, sequence: Sequence) -> None:
        """It is not in the batch any more, and its KV is free."""
        sequence.generated = sequence.output - (sequence.ends - self._steps)
        sequence.ends = -1
        sequence.allocated = False
        self._count -= 1
        self._context -= sequence.tokens + sequence.generated
        self._used -= sequence.tokens + sequence.generated

    def _join(self, sequence: Sequence) -> None:
        """Its KV is loaded: the last token of its prompt is computed as in a decode step."""
        self._enter(sequence)
        self._joined.append(sequence)
        self._cache.remember(sequence.blocks, sequence.block)

    def _preempt(self) -> bool:
        before = self.preempted
        while self._used + self._count > self.profile.kv_cache_tokens and self._count > 1:
            _, _, newest = max(
                (entry for entry in self._running if (entry[2].ends, entry[2].began) == entry[:2]),
                key=lambda entry: entry[1],
            )
            self._leave(newest)
            newest.last_token = self._loop.time()
            newest.loaded = False
            newest.transfer = None
            self.preempted += 1
            self._waiting.appendleft(newest)
        return self.preempted > before

    # KV from one engine to another.

    def _begin_load(self, sequence: Sequence) -> bool:
        """Whether the first of the waiting ones waits for KV from now on, outside the batch."""
        transfer = sequence.transfer
        if transfer is None or transfer.taker is not sequence or transfer.ended:
            return False
        if transfer.dropped:
            transfer.ended = True
            self.twice += 1
            return False
        self._waiting.popleft()
        self._allocate(sequence)
        self._loading += 1
        transfer.wanted = True
        if transfer.ready:
            self._send(transfer)
        return True

    def _hold(self, transfer: Transfer) -> None:
        """The prompt is computed: send its KV if decode has blocks for it, else hold it."""
        transfer.ready = True
        if transfer.wanted:
            self._send(transfer)
            return
        self._held[transfer] = None
        while sum(one.tokens for one in self._held if not one.wanted) > HOLD_FRACTION * self.profile.kv_cache_tokens:
            newest = next(one for one in reversed(self._held) if not one.wanted)
            newest.dropped = True
            self.release(newest)

    def release(self, transfer: Transfer) -> None:
        """Free KV that was held for a transfer."""
        self._held.pop(transfer, None)
        self._used -= transfer.tokens
        self._wake()

    def _send(self, transfer: Transfer) -> None:
        self._link_free = max(self._loop.time(), self._link_free) + self.profile.transfer_seconds(transfer.tokens)
        self._loop.call_at(self._link_free + self.profile.hand_over_seconds, _loaded, transfer)

    def loaded(self, sequence: Sequence) -> None:
        """The KV of a waiting sequence has arrived."""
        self._loading -= 1
        sequence.loaded = True
        self._waiting.appendleft(sequence)
        self._wake()


def _loaded(transfer: Transfer) -> None:
    assert transfer.taker is not None
    transfer.ended = True
    transfer.prefill.release(transfer)
    transfer.decode.loaded(transfer.taker)
