"""The connector's worker side, one per rank: it has the cache and the connections. vLLM calls it around every step."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from dataclasses import replace
from functools import partial

import torch

from disagg_kv.decode.peer_connection import PeerConnections
from disagg_kv.decode.pending_loads import Load, PendingLoads
from disagg_kv.engine import versions
from disagg_kv.engine.announce import Announcer
from disagg_kv.engine.energy import EnergyReader, gpus_of_rank
from disagg_kv.engine.fences import StepFence
from disagg_kv.engine.groups import CacheGroups
from disagg_kv.engine.layout import TorchCache
from disagg_kv.engine.plan import Plan
from disagg_kv.outcomes import RECOMPUTED, UNFETCHED, Outcomes
from disagg_kv.ports import PortBlock, port_of_rank
from disagg_kv.prefill.send_queue import SendQueue
from disagg_kv.prefill.server import Server
from disagg_kv.protocol.handshake import Identity, Shape
from disagg_kv.settings import Settings
from disagg_kv.tally import Tally
from disagg_kv.trace import Trace
from disagg_kv.transport.factory import RankContext, set_up_ipc

logger = logging.getLogger("vllm.disagg_kv")
_SWITCH_SECONDS = 0.0005
"""A busy engine thread may delay the transfer threads by this interval (Python's default: 5 ms)."""
_HOLD_FRACTION_OF_BOTH = 0.25
"""Upper limit of ``hold_fraction`` with kv_both, see ``ConnectorScheduler``."""


class ConnectorWorker:
    """No-op until ``register`` has been called."""

    def __init__(
        self,
        decode: bool,
        settings: Settings,
        model: tuple[str, str],
        groups: CacheGroups,
        tp: int,
        rank: int,
        port: int,
        host: str,
        overlap: bool,
        both: bool = False,
    ) -> None:
        """Args:
        decode: whether this engine loads (kv_consumer) or offers (kv_producer).
        model: name and digest.
        groups: cache groups of the engine.
        tp: tensor parallel size.
        rank: tensor parallel rank.
        port: KV port of rank 0, unless ``kv_ports`` is set.
        host: IP address to announce.
        overlap: whether layers may be sent while later ones are computed; never with recurrent states.
        both: whether a decode engine offers KV too (kv_both).
        """
        self._decode, self._both, self._settings = decode, both, settings
        self._model, self._groups, self._tp, self._rank = model, groups, tp, rank
        self._port, self._host = port, host
        self._overlap = overlap and (both or not decode) and not groups.have_states
        self._step: StepFence | None = None
        self._written: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self.outcomes = Outcomes()
        """Counts for vLLM's /metrics."""
        self._block: PortBlock | None = None
        self._ready = False

    def register(self, layers: dict[str, torch.Tensor], num_blocks: int) -> None:
        """Take the cache and open the KV port.

        Raises:
            Unsupported: this cache cannot be moved.
            OSError: the port is taken, or no block of ``kv_ports`` is free.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        settings, role = self._settings, "decode" if self._decode else "prefill"
        self._cache = cache = TorchCache(layers, num_blocks, groups=self._groups)
        name, digest = self._model
        shape = Shape(name, cache.dtype, self._groups.block_size, cache.layout, cache.planes, cache.block_bytes,
                      self._tp, digest)  # fmt: skip
        identity = Identity(role, uuid.uuid4().hex, self._rank, shape)
        context = RankContext(identity, settings, cache, Trace(settings.trace, role=role, rank=self._rank))
        set_up_ipc(context, offers=self._both or not self._decode)
        transports = context.transports()
        self._overlap = self._overlap and any(context.overlaps(name) for name in transports)
        self._context = context
        self._serving = replace(context, identity=replace(identity, role="prefill")) if self._both else context
        fraction = min(settings.hold_fraction, _HOLD_FRACTION_OF_BOTH) if self._both else settings.hold_fraction
        hold_blocks = max(1, int(num_blocks * fraction))
        self._send_queue = SendQueue(settings.hold_timeout_s, settings.max_waiting, hold_blocks=hold_blocks)
        self._recomputed = Tally("prompts computed here because their KV was not received", logger.warning)
        self._unfetched = Tally("prompts whose KV was computed but never fetched", logger.warning)
        self._pending = PendingLoads()
        self._connections = PeerConnections(context, self._pending)
        self._server = Server(
            self._serving, self._send_queue, self._kv_port(), self._pending.release,
            self._connections.connect if self._decode else None,
        )  # fmt: skip
        self._announcer: Announcer | None = None
        self._energy: EnergyReader | None = None
        if settings.announce_to and self._rank == 0:
            if settings.energy == "on" and cache.on_gpu:
                self._energy = EnergyReader(partial(gpus_of_rank, cache.device.index or 0, self._tp))
            self._announcer = Announcer(
                settings,
                identity,
                self._host,
                self._server.port,
                transports,
                self._connections.transports.running,
                self._both,
                tuple if self._energy is None else self._energy.reports,
            )
            self._serving.announcement = self._announcer.fields
            self._announcer.start()
        self._ready = True
        logger.info(
            "KV connector: %s, model %s@%s, rank %d of %d, KV port %s:%d, transports %s, %d planes of %d bytes per "
            "block, layout %s", "prefill and decode" if self._both else role, name, digest[:12], self._rank, self._tp,
            settings.listen, self._server.port, "/".join(transports), cache.planes, cache.row_bytes, cache.layout,
        )  # fmt: skip

    def _kv_port(self) -> int:
        ports = self._settings.port_range
        if ports is None:
            return self._port + self._rank
        port, self._block = port_of_rank(
            ports, self._tp, self._rank, self._settings.listen, "kv_ports", versions.from_first_rank
        )
        return port

    def on_preemption(self, plan: Plan) -> None:
        """Stop reading blocks of preempted requests, which this step may overwrite."""
        for name in plan.suspends:
            if not self._send_queue.suspend(name, self._settings.stall_timeout_s):
                logger.warning("aborted a transfer of the preempted request %s", name)

    def layer_enqueued(self, plan: Plan, layer: str) -> None:
        """Record that the GPU has this layer's work; its KV may be sent once that is complete."""
        if not plan.progress or not self._overlap or layer not in self._cache.layers:
            return
        if self._step is None:
            self._open(plan)
            self._advance(plan, StepFence(self._cache.planes))
            self._written.clear()
        assert self._step is not None
        self._written.add(layer)
        place = self._cache.layers[layer]
        if self._cache.writers[place] <= self._written:
            self._step.layer(*place, self._cache.mark())

    def begin(self, plan: Plan) -> None:
        """Start and end what the plan names. vLLM calls it before the layers up to 0.26, after them later."""
        if not self._ready:
            return
        if plan.updated:
            self._renew()
        self._open(plan)
        for name, reason in plan.drops:
            self._send_queue.drop(name, reason)
        for name in plan.cancels:
            self._pending.cancel(name)
        for address, key in plan.releases:
            self._connections.release(address, key)
        if plan.loads:
            fence, deadline = self._cache.mark(), time.monotonic() + self._settings.load_timeout_s
            for load in plan.loads:
                self._connections.start(
                    Load(load.key, load.request, load.blocks, load.first, deadline, fence=fence, adapter=load.adapter,
                         tails=load.tails),
                    load.address,
                )  # fmt: skip

    def computed(self, plan: Plan) -> None:
        """Record that the GPU has all work of the step; its KV may be sent once that is complete."""
        if plan.progress and self._ready:
            fence = self._step or StepFence(self._cache.planes)
            fence.finish(self._cache.mark())
            if self._step is None:
                self._advance(plan, fence)
            self._step = None
            self._context.trace("computed", requests=len(plan.progress))

    def finished(self, plan: Plan | None, finished_ids: set[str]) -> tuple[set[str], set[str]]:
        """Return requests whose sending and whose receiving has ended.

        Args:
            finished_ids: requests that the engine has finished since the last call.
        """
        if not self._ready:
            return set(), set()
        self._send_queue.finish(finished_ids)
        if plan is not None and plan.idle and self._settings.idle_wait_ms:
            loads = self._decode and (not self._both or self._pending.waiting())
            transfers = self._pending if loads else self._send_queue
            transfers.wait(self._settings.idle_wait_ms / 1000)
        if plan is not None and not plan.idle:
            self._context.trace("step")
        sent = self._send_queue.collect()
        collected = self._pending.collect()
        self._connections.give_up(collected.unwanted)
        if self._groups.have_tails:
            self._failed_requests |= collected.requests - collected.loaded
        else:
            self._failed_blocks |= collected.failed_blocks
        unfetched = tuple(self._send_queue.take_unfetched().elements())
        self._recomputed.add(collected.reasons)
        self._unfetched.add(unfetched)
        self.outcomes.loaded(len(collected.loaded))
        self.outcomes.ended(RECOMPUTED, collected.reasons)
        self.outcomes.ended(UNFETCHED, unfetched)
        for name in collected.requests:
            self._context.trace("loaded", request=name, failed=len(collected.failed_blocks))
        return sent, set(collected.requests)

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks of loads that failed, each once; empty with several cache groups."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Return the requests whose load failed, each once; empty with one cache group, which names blocks."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def _renew(self) -> None:
        """End every connection and become incompatible with all peers: the weights are updated in place."""
        self._context.renew()
        if self._both:
            self._serving.identity = replace(self._context.identity, role="prefill")
        self._connections.close()
        self._server.disconnect()
        if self._announcer is not None:
            self._announcer.renew(self._context.identity)

    def _open(self, plan: Plan) -> None:
        opens, plan.opens = plan.opens, []
        for opening in opens:
            self._context.trace("open", key=opening.key.transfer, blocks=opening.total)
            self._send_queue.open(opening.key, opening.request, opening.total, opening.adapter, opening.tails)

    def _advance(self, plan: Plan, fence: StepFence) -> None:
        self._step = fence
        for step in plan.progress:
            self._send_queue.progress(step.request, step.blocks, step.ready, fence)

    def close(self) -> None:
        if self._ready:
            self._ready = False
            if self._announcer is not None:
                self._announcer.close()
            if self._energy is not None:
                self._energy.close()
            self._server.close()
            if self._block is not None:
                self._block.close()
            self._connections.close()
