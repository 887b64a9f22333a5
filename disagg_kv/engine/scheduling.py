"""The scheduler half: which requests load or offer KV, and when. One object per engine, without tensors and sockets.

Rules on decode: a request is loaded at most once; whatever happens to the load, after it the request is an ordinary
one. Of several requests with the same key (``n`` > 1) one loads and the others wait for it and then find its blocks
in the prefix cache. Rules on prefill: of several requests with the same key one is offered; the blocks of a finished
request stay until the worker half says that nobody reads them (``finished_sending``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from disagg_kv.engine import params, versions
from disagg_kv.engine.adapters import Adapters
from disagg_kv.engine.params import Transfer
from disagg_kv.engine.plan import Open, Plan, Progress, StartLoad
from disagg_kv.protocol.keys import Key
from disagg_kv.settings import Settings

logger = logging.getLogger("vllm.disagg_kv")
_REMEMBERED = 8192


@dataclass
class _Offer:
    key: Key
    tokens: int
    total: int
    blocks: list[int]
    computed: bool = False


class SchedulerHalf:
    """See the module. ``decode``: whether this engine loads (kv_consumer) or offers (kv_producer)."""

    def __init__(self, decode: bool, block_size: int, settings: Settings) -> None:
        self._decode, self._block, self._settings = decode, block_size, settings
        self._min_load = settings.min_load_tokens or block_size + 1
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
        """An RPC is about to write this engine's weights. Nothing is offered or loaded from now on: neither side can
        tell which weights the other one has by then."""
        if self._updated:
            return
        logger.error("weights are written in place (%s): this engine exchanges no KV until it is restarted", method)
        self._updated = self._plan.updated = True
        self._plan.drops += [(name, "the weights were updated") for name in self._offers]

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded behind the ``computed`` ones that are here, and whether that is asynchronous."""
        if not self._decode or self._updated or request.request_id in self._tried:
            return 0, False
        transfer = self._transfer(request)
        if transfer is None:
            return 0, False
        if self._loading.get(transfer.key, request.request_id) != request.request_id:
            return None, False
        missing = request.num_prompt_tokens - computed
        if transfer.key in self._loaded:
            self._tried.add(request.request_id)
            return 0, False
        unfit = computed % self._block or request.num_tokens != request.num_prompt_tokens
        unfit = unfit or transfer.adapter == params.UNCERTAIN
        if missing < self._min_load or unfit or versions.needs_whole_prompt(request):
            self._tried.add(request.request_id)
            self._plan.releases.append((transfer.address, transfer.key))
            return 0, False
        return missing, True

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """The request has blocks; ``external`` tokens of them are to be loaded (as ``matched`` said)."""
        name = request.request_id
        transfer = self._transfer(request)
        if transfer is None:
            return
        total = -(-request.num_prompt_tokens // self._block)
        if self._decode:
            if external > 0:
                first = (request.num_prompt_tokens - external) // self._block
                ids = versions.first_group(blocks.get_block_ids())[first:total]
                self._tried.add(name)
                self._loading[transfer.key] = name
                load = StartLoad(name, transfer.key, transfer.address, first, ids, transfer.adapter)
                self._plan.loads.append(load)
        elif name not in self._offers and transfer.key not in self._offered and not self._updated:
            self._offers[name] = _Offer(transfer.key, request.num_prompt_tokens, total, [])
            self._offered[transfer.key] = name
            self._plan.opens.append(Open(name, transfer.key, total, transfer.adapter))

    def plan(self, output: Any) -> Plan:
        """What the worker half has to do in the step of this scheduler output."""
        plan, self._plan = self._plan, Plan()
        plan.idle = output.total_num_scheduled_tokens == 0
        if self._offers:
            for name in output.preempted_req_ids or ():
                offer = self._offers.get(name)
                if offer is not None:
                    offer.computed, offer.blocks = False, []
                    plan.suspends.append(name)
            for new in output.scheduled_new_reqs:
                blocks = versions.first_group(new.block_ids)
                self._advance(plan, output, new.req_id, blocks, True, new.num_computed_tokens)
            cached = output.scheduled_cached_reqs
            for place, name in enumerate(cached.req_ids):
                if name in self._offers:
                    blocks, anew = versions.first_group(cached.new_block_ids[place]), name in cached.resumed_req_ids
                    self._advance(plan, output, name, blocks, anew, cached.num_computed_tokens[place])
        return plan

    def finished(self, request: Any) -> bool:
        """The request is over. True if its blocks have to stay until the worker half names it."""
        name = request.request_id
        transfer = self._transfer(request)
        del self._transfers[name]
        if self._decode:
            if transfer is not None:
                if self._loading.get(transfer.key) == name:
                    self._plan.cancels.append(name)
                elif name not in self._tried and not self._known(transfer.key):
                    self._plan.releases.append((transfer.address, transfer.key))
            self._tried.discard(name)
            return False
        offer = self._offers.get(name)
        if offer is None:
            return False
        if not offer.computed or versions.aborted(request):
            self._plan.drops.append((name, "aborted"))
        return True

    def moved(self, sent: set[str], received: set[str]) -> None:
        """The worker half is done with these requests."""
        for name in sent:
            offer = self._offers.pop(name, None)
            if offer is not None:
                self._offered.pop(offer.key, None)
        if received:
            for key in [key for key, name in self._loading.items() if name in received]:
                del self._loading[key]
                self._loaded[key] = None
                while len(self._loaded) > _REMEMBERED:
                    self._loaded.popitem(last=False)

    def _known(self, key: Key) -> bool:
        return key in self._loading or key in self._loaded

    def _transfer(self, request: Any) -> Transfer | None:
        name = request.request_id
        if name not in self._transfers:
            read = None if self._updated else params.read(request, self._decode, self._settings, self.adapters)
            self._transfers[name] = read
        return self._transfers[name]

    def _advance(self, plan: Plan, output: Any, name: str, blocks: list[int], anew: bool, computed: int) -> None:
        offer = self._offers.get(name)
        if offer is None or offer.computed or self._updated:
            return
        offer.blocks = blocks if anew else offer.blocks + blocks
        done = computed + output.num_scheduled_tokens[name]
        offer.computed = done >= offer.tokens
        ready = offer.total if offer.computed else done // self._block
        if ready:
            plan.progress.append(Progress(name, offer.blocks[: offer.total], ready))
