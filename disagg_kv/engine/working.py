"""The worker half: one per rank, where the cache and the connections are. Called by vLLM around every step."""

from __future__ import annotations

import logging
import sys
import time
import uuid

import torch

from disagg_kv.decode.inbox import Inbox, Load
from disagg_kv.decode.link import Links
from disagg_kv.engine.announce import Announcer
from disagg_kv.engine.fences import StepFence
from disagg_kv.engine.layout import TorchCache
from disagg_kv.engine.plan import Plan
from disagg_kv.prefill.outbox import Outbox
from disagg_kv.prefill.server import Server
from disagg_kv.protocol.handshake import Identity, Shape
from disagg_kv.settings import Settings
from disagg_kv.tally import Tally
from disagg_kv.trace import Trace
from disagg_kv.transport.factory import Node

logger = logging.getLogger("vllm.disagg_kv")
_SWITCH_SECONDS = 0.0005
"""Python's default of 5 ms is how long a busy engine thread may keep the transfer threads from running."""


class WorkerHalf:
    """Does nothing until the cache is registered."""

    def __init__(
        self,
        decode: bool,
        settings: Settings,
        model: tuple[str, str],
        block_size: int,
        tp: int,
        rank: int,
        port: int,
        host: str,
        overlap: bool,
    ) -> None:
        """``model``: name and digest."""
        self._decode, self._settings = decode, settings
        self._model, self._block_size, self._tp, self._rank = model, block_size, tp, rank
        self._port, self._host = port, host
        self._overlap = overlap and not decode
        self._step: StepFence | None = None
        self._failed: set[int] = set()
        self._ready = False

    def register(self, layers: dict[str, torch.Tensor], num_blocks: int) -> None:
        """Opens the KV port. Unsupported for a cache that cannot be moved, OSError if the port is taken."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        settings, role = self._settings, "decode" if self._decode else "prefill"
        self._cache = cache = TorchCache(layers, num_blocks)
        name, digest = self._model
        shape = Shape(name, cache.dtype, self._block_size, cache.layout, cache.planes, cache.block_bytes, self._tp,
                      digest)  # fmt: skip
        identity = Identity(role, uuid.uuid4().hex, self._rank, shape)
        node = Node(identity, settings, cache, Trace(settings.trace, role=role, rank=self._rank))
        transports = node.transports()
        self._overlap = self._overlap and any(node.overlaps(name) for name in transports)
        self._node = node
        hold_blocks = max(1, int(num_blocks * settings.hold_fraction))
        self._outbox = Outbox(settings.hold_timeout_s, settings.max_waiting, hold_blocks=hold_blocks)
        self._tally = Tally(
            "prompts computed here because their KV did not come" if self._decode
            else "prompts whose KV was computed and given up", logger.warning,
        )  # fmt: skip
        self._inbox = Inbox()
        self._links = Links(node, self._inbox)
        self._server = Server(
            node, self._outbox, self._port + self._rank, self._inbox.release,
            self._links.meet if self._decode else None,
        )  # fmt: skip
        self._announcer: Announcer | None = None
        if settings.proxy_ip and self._rank == 0:
            self._announcer = Announcer(settings, identity, self._host, self._server.port, transports)
        self._ready = True
        logger.info(
            "KV connector: %s, model %s@%s, rank %d of %d, KV port %s:%d, transports %s, %d planes of %d bytes per "
            "block, layout %s", role, name, digest[:12], self._rank, self._tp, settings.listen, self._server.port,
            "/".join(transports), cache.planes, cache.row_bytes, cache.layout,
        )  # fmt: skip

    def before_overwriting(self, plan: Plan) -> None:
        """Preempted requests lose their blocks in this step: nobody may read them any more."""
        for name in plan.suspends:
            if not self._outbox.suspend(name, self._settings.stall_timeout_s):
                logger.warning("a transfer of the preempted request %s was broken off", name)

    def layer_given(self, plan: Plan, layer: str) -> None:
        """The GPU has been given this layer of the step; what it writes may be sent behind that."""
        if not plan.progress or not self._overlap or layer not in self._cache.layers:
            return
        if self._step is None:
            self._open(plan)
            self._advance(plan, StepFence(self._cache.planes))
        assert self._step is not None
        self._step.layer(*self._cache.layers[layer], self._cache.mark())

    def begin(self, plan: Plan) -> None:
        """Starts and ends what the step wants started and ended. Comes before the layers up to 0.26, later behind."""
        if not self._ready:
            return
        if plan.updated:
            self._renew()
        self._open(plan)
        for name, reason in plan.drops:
            self._outbox.drop(name, reason)
        for name in plan.cancels:
            self._inbox.cancel(name)
        for address, key in plan.releases:
            self._links.release(address, key)
        if plan.loads:
            fence, deadline = self._cache.mark(), time.monotonic() + self._settings.load_timeout_s
            for load in plan.loads:
                self._links.start(
                    Load(load.key, load.request, load.blocks, load.first, deadline, fence=fence, adapter=load.adapter),
                    load.address,
                )

    def computed(self, plan: Plan) -> None:
        """The step's kernels have been given to the GPU; what they compute may be sent behind them."""
        if plan.progress and self._ready:
            fence = self._step or StepFence(self._cache.planes)
            fence.finish(self._cache.mark())
            if self._step is None:
                self._advance(plan, fence)
            self._step = None
            self._node.trace("computed", requests=len(plan.progress))

    def finished(self, plan: Plan | None, over: set[str]) -> tuple[set[str], set[str]]:
        """Requests whose sending and whose receiving has ended. ``over``: finished for the engine since last time."""
        if not self._ready:
            return set(), set()
        self._outbox.finish(over)
        if plan is not None and plan.idle and self._settings.idle_wait_ms:
            waiter = self._inbox if self._decode else self._outbox
            waiter.wait(self._settings.idle_wait_ms / 1000)
        sent = self._outbox.collect()
        news = self._inbox.collect()
        self._links.give_up(news.unwanted)
        self._failed |= news.failed_blocks
        self._tally.add(news.reasons if self._decode else self._outbox.take_unfetched().elements())
        for name in news.requests:
            self._node.trace("loaded", request=name, failed=len(news.failed_blocks))
        return sent, set(news.requests)

    def take_failed(self) -> set[int]:
        """Blocks of loads that ended without success, each named once."""
        failed, self._failed = self._failed, set()
        return failed

    def _renew(self) -> None:
        """The weights are written in place: every connection ends, and no peer fits any more."""
        self._node.renew()
        self._links.close()
        self._server.disconnect()
        if self._announcer is not None:
            self._announcer.renew(self._node.identity)

    def _open(self, plan: Plan) -> None:
        opens, plan.opens = plan.opens, []
        for opening in opens:
            self._outbox.open(opening.key, opening.request, opening.total, opening.adapter)

    def _advance(self, plan: Plan, fence: StepFence) -> None:
        self._step = fence
        for step in plan.progress:
            self._outbox.progress(step.request, step.blocks, step.ready, fence)

    def close(self) -> None:
        if self._ready:
            self._ready = False
            if self._announcer is not None:
                self._announcer.close()
            self._server.close()
            self._links.close()
