"""The engine's heart: one loop, one batch, one step at a time, everybody in it together.

This shape is why vLLM fails as it does. On a decode engine a step that must load KV which is not there waits for
it inside the forward pass, and with it wait all other requests, aborts included. On a prefill engine the step
ends when the KV is handed over, so a decode engine that does not answer stops it for ever
(vLLM 0.21 ``v1/engine/core.py``, ``v1/core/sched/scheduler.py``, ``p2p_nccl_connector.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from disagg_sim.config import SimConfig
from disagg_sim.connectors.p2p_nccl_memory import ReceiveStore
from disagg_sim.connectors.p2p_nccl_sender import KvSender, SendItem
from disagg_sim.faults import Faults
from disagg_sim.logprobs import prompt_logprobs, token_logprobs
from disagg_sim.metrics import Counters
from disagg_sim.prefix_cache import PrefixCache
from disagg_sim.request import EngineDeadError, EngineRequest, Token, WorkerError, peer_address
from disagg_sim.text import SEED_BYTES, Answer, seed_of
from disagg_sim.vocabulary import EOS_ID

logger = logging.getLogger(__name__)


class StepLoop:
    """Runs requests to their end; dies of what vLLM dies of.

    Attributes:
        steps: steps that have ended, the engine's clock.
        stalled_on: the request whose KV the current step is waiting for (D) or sending (P).
        death: the exception that ended the engine, as text; None while it lives.
    """

    def __init__(
        self,
        config: SimConfig,
        faults: Faults,
        store: ReceiveStore,
        sender: KvSender,
        counters: Counters,
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self._config = config
        self._faults = faults
        self._store = store
        self._sender = sender
        self._counters = counters
        self._changed = changed
        self._died = died
        self._cache = PrefixCache(config.prefix_cache_blocks if config.is_producer else 0)
        self._inbox: deque[tuple[str, EngineRequest]] = deque()
        self._wake = asyncio.Event()
        self._kv_arrived = asyncio.Event()
        self._known_prefills: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self.waiting: deque[EngineRequest] = deque()
        self.running: list[EngineRequest] = []
        self.steps = 0
        self.stalled_on: str | None = None
        self.death: str | None = None

    # The HTTP side's three verbs.

    def add(self, request: EngineRequest) -> None:
        """Hand a request in; it is taken up between two steps.

        Raises:
            EngineDeadError: when the engine is dead.
        """
        if self.death is not None:
            raise EngineDeadError
        self._inbox.append(("add", request))
        self._wake.set()
        self._changed()

    def abort(self, request: EngineRequest) -> None:
        """Withdraw a request; it takes effect between two steps, so never while a step hangs."""
        if self.death is None and not request.finished:
            self._inbox.append(("abort", request))
            self._wake.set()
            self._changed()

    def kv_changed(self) -> None:
        """Tell the loop that KV has arrived."""
        self._kv_arrived.set()

    def start(self) -> None:
        """Begin to step."""
        self._task = asyncio.create_task(self._run(), name="step-loop")

    async def stop(self) -> None:
        """End the loop; whoever still waits gets :class:`EngineDeadError`. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.death is None:
            self.death = "stopped"
        self._fail_all()

    @property
    def pending(self) -> int:
        """Requests that wait for their first step."""
        return len(self.waiting) + sum(1 for verb, _ in self._inbox if verb == "add")

    @property
    def aborting(self) -> int:
        """Aborts that the loop has not come round to."""
        return sum(1 for verb, _ in self._inbox if verb == "abort")

    def _fail_all(self) -> None:
        everyone = [*self.running, *self.waiting, *(request for verb, request in self._inbox if verb == "add")]
        self.running.clear()
        self.waiting.clear()
        self._inbox.clear()
        for request in everyone:
            request.finished = True
            request.outputs.put_nowait((request, EngineDeadError()))

    async def _run(self) -> None:
        try:
            while True:
                self._take_inbox()
                if not self.waiting and not self.running:
                    self._changed()
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._faults.gate("schedule")
                self._take_inbox()
                await self._step()
        except WorkerError as error:
            logger.error("The engine died: %s", error)
            self.death = str(error)
            self.stalled_on = None
            self._fail_all()
            self._died()
            self._changed()

    def _take_inbox(self) -> None:
        while self._inbox:
            verb, request = self._inbox.popleft()
            if verb == "abort":
                self._forget(request)
                continue
            if any(other.id == request.id for other in (*self.running, *self.waiting)):
                self.waiting.append(request)
                raise WorkerError(f"AssertionError: duplicate request id ({request.id})")
            self.waiting.append(request)

    def _forget(self, request: EngineRequest) -> None:
        if request.finished:
            return
        request.finished = True
        self._counters.aborted += 1
        if request in self.running:
            self.running.remove(request)
        if request in self.waiting:
            self.waiting.remove(request)
        self._store.release(request.id)
        self._changed()

    # One step.

    async def _step(self) -> None:
        fresh, ready, computed = self._schedule()
        self._changed()
        if not self.running:
            return
        await self._faults.gate("forward")
        await self._forward(fresh, ready, computed)
        await self._faults.gate("answer")
        for request in ready:
            self._emit(request)
        self.running = [request for request in self.running if not request.finished]
        self.steps += 1
        self._changed()

    async def _forward(self, fresh: list[EngineRequest], ready: list[EngineRequest], computed: int) -> None:
        if self._config.is_producer:
            await self._forward_prefill(ready, computed)
        else:
            await self._load(fresh)
            await asyncio.sleep(self._config.time_per_output_token)

    def _schedule(self) -> tuple[list[EngineRequest], list[EngineRequest], int]:
        """The batch: who is new, whose prompt is complete after this step, how many prompt tokens are computed."""
        config = self._config
        if config.is_producer:
            for request in self.running:
                if request.prefilled >= len(request.prompt_ids):
                    raise WorkerError(f"AssertionError: req_id in self.chunked_prefill ({request.id})")
        fresh: list[EngineRequest] = []
        while self.waiting and len(self.running) < config.max_num_seqs:
            request = self.waiting.popleft()
            if config.is_producer:
                skip_cache = request.sampling.prompt_logprobs is not None
                request.local_cached = 0 if skip_cache else self._cache.hits(request.prompt_ids)
                request.prefilled = request.local_cached
            else:
                request.external_tokens = len(request.prompt_ids) - 1
                request.prefilled = request.external_tokens
            self.running.append(request)
            fresh.append(request)
        budget = config.max_num_batched_tokens
        ready: list[EngineRequest] = []
        for request in self.running:
            missing = min(len(request.prompt_ids) - request.prefilled, budget)
            request.prefilled += missing
            budget -= missing
            if request.prefilled == len(request.prompt_ids):
                ready.append(request)
        return fresh, ready, config.max_num_batched_tokens - budget

    async def _forward_prefill(self, ready: list[EngineRequest], computed: int) -> None:
        config = self._config
        if config.prefill_tokens_per_second:
            await asyncio.sleep(computed / config.prefill_tokens_per_second)
        else:
            await asyncio.sleep(0)
        for layer in range(config.kv_layers):
            for request in ready:
                address = peer_address(request.id, is_prefill=True)
                self._sender.put(self._tensor(request, layer, address))
        if ready:
            self.stalled_on = ready[0].id
            self._changed()
            await self._sender.wait_for_sent()
            self.stalled_on = None
        for request in ready:
            request.answer = Answer(seed_of(request.prompt_ids), request.index, request.sampling.guide)
            request.prompt_logprobs = prompt_logprobs(request, wrong=False)
            self._cache.add(request.prompt_ids)
            self._counters.prompt(local=request.local_cached, total=len(request.prompt_ids))

    def _tensor(self, request: EngineRequest, layer: int, address: str) -> SendItem:
        config, seed, half, count = self._config, seed_of(request.prompt_ids), SEED_BYTES // 2, len(request.prompt_ids)
        last = config.kv_layers - 1
        part = seed[:half] if layer == 0 else seed[half:] if layer == last else b""
        size = max(1, count * config.kv_bytes_per_token // config.kv_layers)
        padding = count * config.kv_wire_bytes_per_token // config.kv_layers
        return SendItem(request.id, layer, address, part, count, size, padding)

    async def _load(self, fresh: list[EngineRequest]) -> None:
        for request in fresh:
            count = len(request.prompt_ids)
            seed, garbage = seed_of(request.prompt_ids), False
            # A prompt of one token leaves nothing to load: the last token is always computed here.
            if request.external_tokens > 0:
                prefill = peer_address(request.id, is_prefill=False)
                seed = b""
                for layer in range(self._config.kv_layers):
                    await self._wait_for_kv(request.id, layer)
                    tensor = self._store.load(request.id, layer)
                    seed += tensor.seed_part
                    garbage = garbage or tensor.tokens != count
                if prefill not in self._known_prefills:
                    self._known_prefills.add(prefill)
                    await asyncio.sleep(self._config.communicator_seconds)
            request.answer = Answer(seed, request.index, request.sampling.guide, garbage=garbage)
            request.prompt_logprobs = prompt_logprobs(request, wrong=request.external_tokens > 0)
            self._counters.prompt(external=request.external_tokens, total=count)

    async def _wait_for_kv(self, request_id: str, layer: int) -> None:
        while not self._store.has(request_id, layer):
            self._kv_arrived.clear()
            self.stalled_on = request_id
            self._changed()
            await self._kv_arrived.wait()
        self.stalled_on = None

    def _emit(self, request: EngineRequest) -> None:
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
            self._store.release(request.id)
