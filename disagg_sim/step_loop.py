"""The core of an engine: one loop and one batch, in which every request moves one step at a time.

This shape is why vLLM fails as it does (vLLM 0.21 ``v1/engine/core.py``): a step ends for all requests or for none,
and new requests and aborts take effect only between two steps. What happens to KV before, between and inside steps is
the part of the engine's connector (:mod:`disagg_sim.connectors`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from disagg_sim.config import SimConfig
from disagg_sim.connectors.base import KvConnector
from disagg_sim.faults import Faults
from disagg_sim.gpu import EngineGpu
from disagg_sim.logprobs import prompt_logprobs, token_logprobs
from disagg_sim.metrics import Counters
from disagg_sim.prefix_cache import PrefixCache
from disagg_sim.request import EngineDeadError, EngineRequest, ReceivedKv, Token, WorkerError
from disagg_sim.text import Answer, seed_of
from disagg_sim.vocabulary import EOS_ID

logger = logging.getLogger(__name__)

_POLL = 0.002
"""Seconds between two attempts to schedule while nothing runs."""


class StepLoop:
    """Runs requests to their end; a :class:`WorkerError` of the connector ends the engine.

    Args:
        changed: called after every change that :meth:`disagg_sim.engine.SimEngine.state` shows.
        died: called once when the engine dies.
        gpu: the simulated GPU that the steps keep busy and whose clock is their pace; None: always the same pace.

    Attributes:
        waiting: requests to be scheduled.
        loading: requests that wait outside the batch for KV.
        running: the batch.
        steps: number of steps completed, the engine's clock.
        last_step: requests in the batch and waiting at the end of the last step.
        death: the exception that ended the engine, as text; None while it lives.
    """

    def __init__(
        self,
        config: SimConfig,
        faults: Faults,
        connector: KvConnector,
        counters: Counters,
        changed: Callable[[], None],
        died: Callable[[], None],
        gpu: EngineGpu | None = None,
    ) -> None:
        self._config = config
        self._faults = faults
        self._connector = connector
        self._counters = counters
        self._changed = changed
        self._died = died
        self._gpu = gpu
        self._cache = PrefixCache(config.prefix_cache_blocks)
        # Otherwise nothing has to be counted in each step.
        self._kv_limited = config.kv_cache_tokens < config.max_num_seqs * config.max_model_len
        self._link_free = 0.0
        self._commands: deque[tuple[str, EngineRequest]] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.waiting: deque[EngineRequest] = deque()
        self.loading: list[EngineRequest] = []
        self.running: list[EngineRequest] = []
        self.steps = 0
        self.last_step = (0, 0)
        self.death: str | None = None
        connector.loaded = self._loaded

    # For the HTTP side.

    def add(self, request: EngineRequest) -> None:
        """Add a request; it is scheduled between two steps.

        Raises:
            EngineDeadError: when the engine is dead.
        """
        if self.death is not None:
            raise EngineDeadError
        self._commands.append(("add", request))
        self._wake.set()
        self._changed()

    def abort(self, request: EngineRequest) -> None:
        """Abort a request. Takes effect between two steps, so never while a step hangs."""
        if self.death is None and not request.finished:
            self._commands.append(("abort", request))
            self._wake.set()
            self._changed()

    def start(self) -> None:
        """Start the loop."""
        self._task = asyncio.create_task(self._run(), name="step-loop")

    async def stop(self) -> None:
        """End the loop; unfinished requests get :class:`EngineDeadError`. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.death is None:
            self.death = "stopped"
        self._fail_all()

    @property
    def pending(self) -> int:
        """Requests that wait for their first step."""
        return len(self.waiting) + len(self.loading) + sum(1 for command, _ in self._commands if command == "add")

    @property
    def kv_blocks_used(self) -> int:
        """Blocks in the KV cache that are not free."""
        requests = (*self.running, *self.loading, *self.waiting)
        return self._connector.held_blocks + sum(self._blocks(one) for one in requests if one.allocated)

    def _blocks(self, request: EngineRequest) -> int:
        """Blocks that the request needs with its next token."""
        return (len(request.prompt_ids) + request.generated) // self._config.kv_block_size + 1

    @property
    def aborting(self) -> int:
        """Aborts that have not taken effect yet."""
        return sum(1 for command, _ in self._commands if command == "abort")

    def _fail_all(self) -> None:
        added = [request for command, request in self._commands if command == "add"]
        unfinished = [*self.running, *self.waiting, *self.loading, *added]
        self.running.clear()
        self.waiting.clear()
        self.loading.clear()
        self._commands.clear()
        for request in unfinished:
            request.finished = True
            request.outputs.put_nowait((request, EngineDeadError()))

    async def _run(self) -> None:
        try:
            while True:
                self._take_commands()
                if not self.waiting and not self.running:
                    self._changed()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._faults.gate("schedule")
                self._take_commands()
                await self._step()
        except WorkerError as error:
            logger.error("The engine died: %s", error)
            self.death = str(error)
            self._fail_all()
            self._died()
            self._changed()

    # Between steps.

    def _take_commands(self) -> None:
        while self._commands:
            command, request = self._commands.popleft()
            if command == "abort":
                self._abort(request)
                continue
            in_use = any(other.id == request.id for other in (*self.running, *self.waiting))
            self.waiting.append(request)
            if in_use and self._connector.unique_ids:
                raise WorkerError(f"AssertionError: duplicate request id ({request.id})")

    def _abort(self, request: EngineRequest) -> None:
        if request.finished:
            return
        request.finished = True
        self._counters.aborted += 1
        for requests in (self.running, self.waiting, self.loading):
            if request in requests:
                requests.remove(request)
        self._connector.finished(request, aborted=True)
        self._changed()

    def _loaded(self, request: EngineRequest, kv: ReceivedKv | None, loader: bool) -> None:
        """See :data:`disagg_sim.connectors.base.Loaded`."""
        profile = self._config.profile
        if profile is not None and kv is not None and loader:
            event_loop, tokens = asyncio.get_running_loop(), len(request.prompt_ids)
            self._link_free = max(event_loop.time(), self._link_free) + profile.transfer_seconds(tokens)
            event_loop.call_at(self._link_free + profile.hand_over_seconds, self._join, request, kv, loader)
            return
        self._join(request, kv, loader)

    def _join(self, request: EngineRequest, kv: ReceivedKv | None, loader: bool) -> None:
        """A load has ended: the request is to be scheduled, unless it was aborted."""
        if request not in self.loading:
            return
        self.loading.remove(request)
        request.load_ended = True
        request.received = kv
        if kv is not None:
            # The last token is always computed. A request that shares the load finds the blocks in the prefix cache.
            cached = len(request.prompt_ids) - 1
            request.external_tokens, request.local_cached = (cached, 0) if loader else (0, cached)
        self.waiting.append(request)
        self._wake.set()

    def _schedule(self) -> tuple[list[EngineRequest], list[EngineRequest], list[tuple[int, int]]]:
        """Form the batch.

        Returns:
            The requests that are new in it, those whose prompt is complete after this step, and the chunks of prompts
            that the step computes, each with the tokens in front of it. The last token of a prompt whose KV came from
            prefill is not among them: it is computed as in a decode step.
        """
        config = self._config
        self._connector.check_batch(self.running)
        free = self._preempt() if self._kv_limited else 0
        fresh: list[EngineRequest] = []
        while self.waiting and len(self.running) < config.max_num_seqs:
            request = self.waiting[0]
            if self._kv_limited and not request.allocated:
                free -= self._blocks(request)
                if free < 0:
                    break
            self.waiting.popleft()
            request.allocated = True
            if not request.load_ended and not request.preempted and self._begin_load(request):
                continue
            if request.preempted:
                request.prefilled = self._cache.hits(request.prompt_ids)
            else:
                if not request.cached_tokens and request.sampling.prompt_logprobs is None:
                    request.local_cached = self._cache.hits(request.prompt_ids)
                request.prefilled = request.cached_tokens
            self.running.append(request)
            fresh.append(request)
        budget = config.max_num_batched_tokens
        ready: list[EngineRequest] = []
        chunks: list[tuple[int, int]] = []
        for request in self.running:
            missing = min(len(request.prompt_ids) - request.prefilled, budget)
            if missing and (not request.external_tokens or request.preempted):
                chunks.append((missing, request.prefilled))
            request.prefilled += missing
            budget -= missing
            if request.prompt_complete:
                ready.append(request)
        return fresh, ready, chunks

    def _preempt(self) -> int:
        """Take the blocks of the newest requests that decode until the others fit. Returns the number of free blocks.

        The tokens that a preempted request has generated are computed again with its prompt; here they take no time.
        """
        free = self._config.kv_blocks - self.kv_blocks_used
        while free < 0:
            decoding = [request for request in self.running if request.answer is not None]
            if len(decoding) < 2:
                break
            newest = decoding[-1]
            self.running.remove(newest)
            free += self._blocks(newest)
            newest.allocated, newest.preempted, newest.prefilled = False, True, 0
            self._counters.preemptions += 1
            self.waiting.appendleft(newest)
        return free

    def _begin_load(self, request: EngineRequest) -> bool:
        # In the list before the load begins: a load may end at once.
        self.loading.append(request)
        if self._connector.begin(request):
            return True
        self.loading.remove(request)
        return False

    # One step.

    async def _step(self) -> None:
        fresh, ready, chunks = self._schedule()
        self._changed()
        if not self.running:
            if self.waiting:
                # KV that decode has not fetched fills the cache. vLLM's engine core polls too.
                await asyncio.sleep(_POLL)
            return
        await self._faults.gate("forward")
        await self._connector.load(fresh)
        await asyncio.sleep(self._seconds(fresh, ready, chunks))
        await self._connector.save([request for request in self.running if request.answer is None])
        for request in ready:
            if request.answer is None:
                self._complete_prompt(request)
        await self._faults.gate("answer")
        for request in ready:
            self._emit(request)
        self.running = [request for request in self.running if not request.finished]
        self.steps += 1
        self.last_step = len(self.running), len(self.waiting) + len(self.loading)
        self._changed()

    def _seconds(self, fresh: list[EngineRequest], ready: list[EngineRequest], chunks: list[tuple[int, int]]) -> float:
        """Duration of the forward pass: the prompt tokens at prefill's speed, and one decode step if any decodes."""
        config, profile = self._config, self._config.profile
        decoding = [request for request in ready if request.generated or request.received is not None]
        if profile is not None:
            prefill = profile.prefill_seconds(chunks)
            context = sum(len(request.prompt_ids) + request.generated for request in decoding)
            loads = sum(request.received is not None for request in fresh)
            decode = profile.decode_seconds(len(decoding), context, loads)
            # Which clock the fixed part follows matters to simulated GPUs only.
            fixed = profile.fixed_seconds(connector=True, mixed=bool(chunks and decoding))
            prefill, decode = (prefill, decode + fixed) if decoding else (prefill + fixed, decode)
        else:
            speed = config.prefill_tokens_per_second
            prefill = sum(tokens for tokens, _ in chunks) / speed if speed else 0.0
            decode = config.time_per_output_token if decoding else 0.0
        return prefill + decode if self._gpu is None else self._gpu.step(prefill, decode)

    def _complete_prompt(self, request: EngineRequest) -> None:
        kv = request.received or ReceivedKv(seed_of(request.prompt_ids), garbage=False)
        request.answer = Answer(kv.seed, request.index, request.sampling.guide, garbage=kv.garbage)
        # vLLM computes logprobs from the first token that it computes itself (``_get_prompt_logprobs_dict`` in
        # ``v1/worker/gpu_model_runner.py``); before that the result is uninitialised memory.
        request.prompt_logprobs = prompt_logprobs(request, wrong=request.external_tokens > 0)
        self._cache.add(request.prompt_ids)
        self._counters.prompt(
            local=request.local_cached, external=request.external_tokens, total=len(request.prompt_ids)
        )

    def _emit(self, request: EngineRequest) -> None:
        """Generate the next token of a request whose prompt is complete."""
        sampling, answer, position = request.sampling, request.answer, request.generated
        assert answer is not None
        may_end = not sampling.ignore_eos and position + 1 > sampling.min_tokens
        number = answer.token(position, may_end=may_end)
        request.generated += 1
        stopped_by = number if number in sampling.stop_token_ids and request.generated > sampling.min_tokens else None
        reason: str | None = None
        if number == EOS_ID or stopped_by is not None:
            reason = "stop"
        elif request.generated >= sampling.max_tokens:
            reason = "length"
        self._counters.generation_tokens += 1
        token = Token(number, token_logprobs(answer, position, number, sampling.logprobs), reason, stopped_by)
        request.outputs.put_nowait((request, token))
        if reason is not None:
            request.finished = True
            self._counters.finished(reason)
            self._connector.finished(request, aborted=False)
