"""The connector's scheduler side: which requests load or offer KV, and when. One object per engine, no tensors or
sockets.

Decode: a request is loaded at most once; however the load ends, the request is an ordinary one afterwards. Of several
requests with the same key (``n`` > 1) one loads, and the others wait for it and then find its blocks in the prefix
cache. Prefill: of several requests with the same key one is offered. The blocks of a finished request stay until the
worker side reports that no sender reads them (``finished_sending``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from disagg_kv.engine import params, versions
from disagg_kv.engine.adapters import Adapters
from disagg_kv.engine.groups import NULL_BLOCK, CacheGroups
from disagg_kv.engine.params import Transfer
from disagg_kv.engine.plan import Open, Plan, Progress, StartLoad
from disagg_kv.protocol.keys import Key
from disagg_kv.settings import Settings

logger = logging.getLogger("vllm.disagg_kv")
_MAX_REMEMBERED = 8192


@dataclass
class _Offer:
    key: Key
    tokens: int
    ids: list[list[int]]
    """Block ids of each cache group. Those behind a window may be freed: only the tails are read."""
    computed: bool = False
    refused: bool = False


class ConnectorScheduler:
    """Args:
    decode: whether this engine loads (kv_consumer) or offers (kv_producer).
    groups: cache groups of the engine.
    both_blocks: blocks of the cache of an engine that loads and offers (kv_both), else 0. A request that names a peer
        loads, another one is offered. Two such engines wait for each other's prompts. So that each can always compute
        what the other one waits for, loads get half of the cache at most, prompts that nobody has fetched a quarter
        (``hold_fraction``), and a prompt that is longer than the remaining quarter is computed, not loaded.
    """

    def __init__(self, decode: bool, groups: CacheGroups, settings: Settings, both_blocks: int = 0) -> None:
        self._decode, self._groups, self._settings = decode, groups, settings
        self._both = both_blocks
        self._waiting_blocks: dict[str, int] = {}
        # What vLLM computes begins behind the last state in its cache, which can be long before what is missing.
        self._min_load = settings.min_load_tokens or (1 if groups.load_completes_prefix else groups.block_size + 1)
        self._cut: set[str] = set()
        self._plan = Plan()
        self._transfers: dict[str, Transfer | None] = {}
        self._tried: set[str] = set()
        self._loading: dict[Key, str] = {}
        self._loaded: OrderedDict[Key, None] = OrderedDict()
        self._offers: OrderedDict[str, _Offer] = OrderedDict()
        self._offered: dict[Key, str] = {}
        self.adapters = Adapters()
        self._updated = False

    def weights_written(self, method: str) -> None:
        """Stop offering and loading: an RPC is about to update this engine's weights in place.

        Neither side can tell afterwards which weights the other one computed with.
        """
        if self._updated:
            return
        logger.error("weights are updated in place (%s): this engine exchanges no KV until it is restarted", method)
        self._updated = self._plan.updated = True
        self._plan.drops += [(name, "the weights were updated") for name in self._offers]

    def added(self, request: Any) -> None:
        """Record that the engine has a new request, before it is scheduled for the first time."""
        transfer = self._transfer(request) if self._groups.have_tails else None
        if transfer is not None and not transfer.address and versions.cut_last_token(request):
            self._cut.add(request.request_id)

    def num_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens beyond the ``computed`` local ones can be loaded, and whether that is asynchronous."""
        if not self._decode or self._updated or request.request_id in self._tried:
            return 0, False
        transfer = self._transfer(request)
        if transfer is None or not transfer.address:
            return 0, False
        if self._loading.get(transfer.key, request.request_id) != request.request_id:
            return None, False
        missing = self._groups.loaded_tokens(request.num_prompt_tokens) - computed
        if transfer.key in self._loaded:
            self._tried.add(request.request_id)
            return 0, False
        unusable = computed % self._groups.block_size or request.num_tokens != request.num_prompt_tokens
        unusable = unusable or transfer.adapter == params.UNCERTAIN
        needed = self._groups.total(missing)
        unusable = unusable or (self._both > 0 and self._groups.total(request.num_prompt_tokens) > self._both // 4)
        if missing < self._min_load or unusable or versions.must_compute_prompt(request):
            self._tried.add(request.request_id)
            self._plan.releases.append((transfer.address, transfer.key))
            return 0, False
        if self._both and sum(self._waiting_blocks.values()) + needed > self._both // 2:
            return None, False
        return missing, True

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """Record that the request has blocks, ``external`` tokens of which are to be loaded (see
        ``num_matched_tokens``)."""
        name = request.request_id
        transfer = self._transfer(request)
        if transfer is None:
            return
        if transfer.address:
            if external > 0:
                tokens = self._groups.loaded_tokens(request.num_prompt_tokens)
                first, lists = tokens - external, self._lists(blocks.get_block_ids())
                ids, tails = self._groups.on_decode(lists, tokens, first)
                self._tried.add(name)
                self._loading[transfer.key] = name
                self._waiting_blocks[name] = len(ids)
                load = StartLoad(name, transfer.key, transfer.address, self._groups.complete(first), ids,
                                 transfer.adapter, tails)  # fmt: skip
                self._plan.loads.append(load)
        elif name not in self._offers and transfer.key not in self._offered and not self._updated:
            tokens = request.num_prompt_tokens
            self._offers[name] = offer = _Offer(transfer.key, tokens, self._lists(None))
            self._offered[transfer.key] = name
            self._plan.opens.append(Open(name, transfer.key, self._groups.total(tokens), transfer.adapter,
                                         self._groups.tails(tokens)))  # fmt: skip
            if self._groups.have_tails and name not in self._cut:
                offer.refused = True
                self._plan.drops.append((name, "prefill does not keep its tail: not a prompt for one token"))

    def plan(self, output: Any) -> Plan:
        """Return what the worker side has to do in the step of this scheduler output."""
        plan, self._plan = self._plan, Plan()
        plan.idle = output.total_num_scheduled_tokens == 0
        if self._offers:
            for name in output.preempted_req_ids or ():
                offer = self._offers.get(name)
                if offer is not None:
                    offer.computed, offer.ids = False, self._lists(None)
                    plan.suspends.append(name)
            for new in output.scheduled_new_reqs:
                self._advance(plan, output, new.req_id, new.block_ids, True, new.num_computed_tokens)
            cached = output.scheduled_cached_reqs
            for index, name in enumerate(cached.req_ids):
                if name in self._offers:
                    ids, resumed = cached.new_block_ids[index], name in cached.resumed_req_ids
                    self._advance(plan, output, name, ids, resumed, cached.num_computed_tokens[index])
        return plan

    @property
    def has_news(self) -> bool:
        """Whether the worker side has to be notified of something that no request belongs to any more."""
        plan = self._plan
        return bool(plan.updated or plan.cancels or plan.releases or plan.drops)

    def finished(self, request: Any, block_ids: Any = None) -> bool:
        """Record that the request has finished. True if its blocks must stay until the worker side reports it.

        Args:
            block_ids: all that it has, by cache group, where vLLM names them.
        """
        name = request.request_id
        self._cut.discard(name)
        transfer = self._transfer(request)
        del self._transfers[name]
        if self._decode and (not self._both or (transfer is not None and transfer.address)):
            if transfer is not None:
                if self._loading.get(transfer.key) == name:
                    self._plan.cancels.append(name)
                elif name not in self._tried and not self._is_loading_or_loaded(transfer.key):
                    self._plan.releases.append((transfer.address, transfer.key))
            self._tried.discard(name)
            self._waiting_blocks.pop(name, None)
            return False
        offer = self._offers.get(name)
        if offer is None:
            return False
        if not offer.computed or versions.aborted(request):
            self._plan.drops.append((name, "aborted"))
        elif self._groups.have_tails and block_ids is not None and not self._kept(offer, self._lists(block_ids)):
            logger.error("request %s ended with other blocks than it was computed with: its KV is not sent", name)
            self._plan.drops.append((name, "its blocks have changed"))
        return True

    def transfers_finished(self, sent: set[str], received: set[str]) -> None:
        """Record requests whose sending or receiving has ended on the worker side."""
        for name in sent:
            offer = self._offers.pop(name, None)
            if offer is not None:
                self._offered.pop(offer.key, None)
        for name in received:
            self._waiting_blocks.pop(name, None)
        if received:
            for key in [key for key, name in self._loading.items() if name in received]:
                del self._loading[key]
                self._loaded[key] = None
                while len(self._loaded) > _MAX_REMEMBERED:
                    self._loaded.popitem(last=False)

    def _is_loading_or_loaded(self, key: Key) -> bool:
        return key in self._loading or key in self._loaded

    def _transfer(self, request: Any) -> Transfer | None:
        name = request.request_id
        if name not in self._transfers:
            decode = self._decode and (not self._both or params.names_peer(request))
            transfer = None if self._updated else params.read(request, decode, self._settings, self.adapters)
            self._transfers[name] = transfer
        return self._transfers[name]

    def _lists(self, block_ids: Any) -> list[list[int]]:
        return versions.block_lists(block_ids, len(self._groups.groups))

    def _kept(self, offer: _Offer, ids: list[list[int]]) -> bool:
        final = self._groups.on_prefill(ids, offer.tokens, offer.tokens)
        return final == self._groups.on_prefill(offer.ids, offer.tokens, offer.tokens)

    def _advance(self, plan: Plan, output: Any, name: str, block_ids: Any, resumed: bool, computed: int) -> None:
        offer = self._offers.get(name)
        if offer is None or offer.computed or offer.refused or self._updated:
            return
        for has, new in zip(offer.ids, self._lists(block_ids), strict=True):
            has[:] = new if resumed else has + new
        done = computed + output.num_scheduled_tokens[name]
        offer.computed = done >= offer.tokens
        blocks = self._groups.on_prefill(offer.ids, offer.tokens, min(done, offer.tokens))
        if self._groups.have_tails and NULL_BLOCK in blocks:
            offer.refused = True
            plan.drops.append((name, "vLLM has freed a block that decode needs"))
        elif blocks:
            plan.progress.append(Progress(name, blocks, len(blocks)))
