"""The step loop of an engine whose connector reads kv_transfer_params: this project's own (docs/connector.md, "What
happens"), or vLLM's NixlConnector.

Either role computes whatever it is asked. On decode a request with KV under way waits outside the batch, so no step
waits for it; when the KV does not come, the prompt is computed. Nothing here can
end the engine, but NixlConnector's assertions.
"""

from __future__ import annotations

import asyncio
from typing import Any

from disagg_sim.connectors.disagg_kv_decode import Loads
from disagg_sim.connectors.disagg_kv_prefill import Offers
from disagg_sim.connectors.disagg_kv_wire import rows_of
from disagg_sim.connectors.nixl import Kept, Reads
from disagg_sim.logprobs import prompt_logprobs
from disagg_sim.prefix_cache import PrefixCache
from disagg_sim.request import EngineRequest
from disagg_sim.step_loop import StepLoop
from disagg_sim.text import SEED_BYTES, Answer, seed_of


class OwnStepLoop(StepLoop):
    """See the module. ``connect`` must be called before ``start``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._cache = PrefixCache(self._config.prefix_cache_blocks)
        self._loading: list[EngineRequest] = []
        self._tried: set[EngineRequest] = set()

    def connect(self, offers: Offers | Kept, loads: Loads | Reads | None) -> None:
        """Name the two sides of the KV exchange; ``loads`` on decode only."""
        self._offers = offers
        self._loads = loads

    @property
    def pending(self) -> int:
        return super().pending + len(self._loading)

    def loaded(self, request: EngineRequest, rows: list[bytes] | None, loader: bool) -> None:
        """The load of a request is over, with its blocks or without. See :data:`disagg_kv_decode.Loaded`."""
        if request not in self._loading:
            return
        self._loading.remove(request)
        request.kv_rows = rows
        if rows is not None:
            # The last token is always computed, and whoever did not load finds the blocks in the prefix cache.
            cached = len(request.prompt_ids) - 1
            request.external_tokens, request.local_cached = (cached, 0) if loader else (0, cached)
        self.waiting.append(request)
        self._wake.set()

    def _fail_all(self) -> None:
        self.waiting.extend(self._loading)
        self._loading.clear()
        self._tried.clear()
        super()._fail_all()

    def _take_inbox(self) -> None:
        while self._inbox:
            verb, request = self._inbox.popleft()
            if verb == "abort":
                self._forget(request)
            else:
                self.waiting.append(request)

    def _forget(self, request: EngineRequest) -> None:
        if request.finished:
            return
        if request in self._loading:
            self._loading.remove(request)
        super()._forget(request)
        self._ended(request, aborted=True)

    def _emit(self, request: EngineRequest) -> None:
        super()._emit(request)
        if request.finished:
            self._ended(request, aborted=False)

    def _ended(self, request: EngineRequest, *, aborted: bool) -> None:
        self._tried.discard(request)
        if self._loads is not None:
            self._loads.ended(request)
        else:
            self._offers.finished(request, aborted=aborted)

    def _schedule(self) -> tuple[list[EngineRequest], list[EngineRequest], int]:
        config = self._config
        fresh: list[EngineRequest] = []
        while self.waiting and len(self.running) < config.max_num_seqs:
            request = self.waiting.popleft()
            if self._loads is not None and request not in self._tried:
                self._tried.add(request)
                self._loading.append(request)
                if self._loads.begin(request):
                    continue
                self._loading.remove(request)
            if request.kv_rows is None:
                whole = request.sampling.prompt_logprobs is not None
                request.local_cached = 0 if whole else self._cache.hits(request.prompt_ids)
            request.prefilled = request.cached_tokens
            if self._loads is None:
                self._offers.begin(request)
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

    async def _forward(self, fresh: list[EngineRequest], ready: list[EngineRequest], computed: int) -> None:
        config = self._config
        seconds = computed / config.prefill_tokens_per_second if config.prefill_tokens_per_second else 0.0
        if any(request.generated or request.kv_rows is not None for request in ready):
            seconds += config.time_per_output_token
        await asyncio.sleep(seconds)
        if self._loads is None:
            for request in self.running:
                if request.answer is None:
                    self._offers.progress(request)
        for request in ready:
            if request.answer is None:
                self._first(request)

    def _first(self, request: EngineRequest) -> None:
        """The prompt's KV is complete, computed or loaded."""
        seed, garbage, rows = seed_of(request.prompt_ids), False, request.kv_rows
        if rows is not None:
            seed = rows[-1][:SEED_BYTES]
            garbage = rows[:-1] != rows_of(self._config, request.prompt_ids)[:-1]
        request.answer = Answer(seed, request.index, request.sampling.guide, garbage=garbage)
        request.prompt_logprobs = prompt_logprobs(request, wrong=False)
        self._cache.add(request.prompt_ids)
        self._counters.prompt(
            local=request.local_cached, external=request.external_tokens, total=len(request.prompt_ids)
        )
