"""Detects engines that are stalled and processes that hang, and decides what is done about them.

States, as this module decides them (`frozen` is the public name of a stalled engine in /stats):

    examined      half of the learnt deadline has passed without output while a leg waits (cluster/progress.py)
    frozen        the engine's own counters show no progress for the other half either. An engine without counters is
                  judged by its output alone, if the waiting legs expect output
    recovering    a frozen decode: prefills of requests that it may wait for are replayed (health/recovery.py)
    given up      a frozen prefill, or a decode that replays did not free: ``restart_wanted`` is set. Waiting decode
                  legs end with 504. Requests on a prefill move to another pair with a new id, while their legs
                  continue, since a prefill is never cancelled
    freed         it makes progress again, while it is idle with a request for one token: a probe admits it; without
                  replays its circuit breaker is half-open first
    hung          a process that neither pings nor answers probes for ``Registry.hung_after``, as after SIGSTOP:
                  given up as above, with its state still LOST or PROBING

Two rules concern pairs. When a second prefill stalls while it sends to the same decode, the KV listener of that decode
is taken to be dead, and the decode is given up too. When a decode is lost, requests that still prefill for it move to
another pair at once; these prefills, which block in their sender, get a shorter deadline.

Each worker of this proxy detects stalls from its own requests. What one reports holds for all, and recovery and giving
up are coordinated (health/peer_view.py). One task checks all instances; each examined instance has one more.
Much earlier an instance is *suspect* (:mod:`disagg_proxy.health.suspicion`), which only concerns new requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.cluster.lease import Lease
from disagg_proxy.cluster.progress import PendingResponse
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import EngineFrozen, ProxyError
from disagg_proxy.health.engine_counters import engine_counters
from disagg_proxy.health.peer_view import NoPeers, PeerView
from disagg_proxy.health.recovery import replay_until_progress
from disagg_proxy.health.serving import ServingMonitor
from disagg_proxy.health.suspicion import Suspicion
from disagg_proxy.upstream import ReadUntil, Upstream
from disagg_proxy.upstream.engine_metrics import read_metrics

log = logging.getLogger(__name__)

_CHECKS = 5
"""Checks of all instances within the shortest deadline; at least one each second."""

_POLLS = 10
"""Requests for an engine's counters within the time in which progress is awaited."""

_MIN_BLOCKED_PREFILLS = 2
"""Prefills that stall while sending to one decode process until that process counts as the cause."""


@dataclass(frozen=True, slots=True)
class ProgressSnapshot:
    """Progress of an engine so far.

    Attributes:
        outputs: chunks of responses, over all workers.
        counters: see :func:`engine_counters`; None when /metrics did not answer.
    """

    outputs: int
    counters: tuple[bytes, ...] | None


class StallDetector:
    """Checks every instance of a registry.

    Args:
        shortest, longest: bounds on the learnt deadline, in seconds.
        headers: encoded header lines for GET /metrics, such as the engines' key.
        peer_view: the other workers of this proxy; None without any.
        replayed: called with an instance for which a prefill is replayed.
        queued: requests that wait for capacity.

    Attributes:
        serving: whether anything is answered.
    """

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        shortest: float,
        longest: float,
        headers: bytes,
        peer_view: PeerView | None = None,
        replayed: Callable[[Instance], None] = lambda instance: None,
        queued: Callable[[], int] = lambda: 0,
    ) -> None:
        self._registry = registry
        self._upstream = upstream
        self._headers = headers
        self._peer_view = peer_view or NoPeers()
        self._replayed = replayed
        self._checking: asyncio.Task[None] | None = None
        self._suspects: dict[Instance, asyncio.Task[None]] = {}
        self.serving = ServingMonitor(registry, queued, shortest, longest)
        self._suspicion = Suspicion(registry, self._counters, self.serving.progressed)
        self.set_bounds(shortest, longest)

    def set_bounds(self, shortest: float, longest: float) -> None:
        """Use these bounds on the learnt deadline from now on, in seconds."""
        self._shortest, self._longest = shortest, longest
        self._interval = min(1.0, shortest / _CHECKS)
        self.serving.set_bounds(shortest, longest)

    def start(self) -> None:
        """Check all instances from now on."""
        self._checking = asyncio.get_running_loop().create_task(self._check_repeatedly(), name="stall detector")

    async def stop(self) -> None:
        """Cancel all tasks."""
        tasks = [*self._suspects.values(), *([self._checking] if self._checking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._suspicion.stop()

    async def _check_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            self.check()

    def check(self) -> None:
        """Check all instances now."""
        for instance in self._registry.instances():
            self._check(instance)
        self.serving.check()

    def _check(self, instance: Instance) -> None:
        now = self._registry.now()
        progress = instance.progress
        progress.peer_outputs = self._peer_view.outputs(instance)
        progressed = progress.poll(now)
        self._suspicion.check(instance, progressed)
        if self._check_hung(instance, now):
            return
        blocked = self._move_requests(instance)
        if instance.state is State.READY and instance not in self._suspects and self._peer_view.frozen(instance):
            self._start(instance, self._join(instance))
            return
        if progressed or instance.state is not State.READY or instance in self._suspects:
            return
        deadline = (progress.blocked_deadline if blocked else progress.deadline)(self._shortest, self._longest)
        if progress.stalled_for(now) > deadline / 2:
            self._start(instance, self._suspect(instance, deadline / 2))

    def _move_requests(self, instance: Instance) -> bool:
        """Move requests away from a prefill that is lost or sends to a lost decode; returns if the latter is so."""
        if instance.role is not Role.PREFILL:
            return False
        blocked = instance.progress.blocked()
        lost = instance.state is not State.READY and instance.unresponsive
        for pending in instance.progress.waiting() if lost else blocked:
            pending.move()
        return bool(blocked)

    def _check_hung(self, instance: Instance, now: float) -> bool:
        """Whether its process counts as hung; gives it up when that is new.

        A host that has vanished looks the same: connection attempts time out.
        """
        if (
            instance.last_probe_response is None
            or not instance.unresponsive
            or instance.state in (State.READY, State.FROZEN)
        ):
            return False
        last_sign = max(instance.last_probe_response, instance.last_ping or 0.0, instance.progress.last_output_at)
        if now - last_sign < self._registry.hung_after:
            return False
        if not instance.restart_wanted:
            pings = "" if instance.last_ping is None else "no ping and "
            reason = f"its process hangs: {pings}no answer from /health for {now - last_sign:.0f} s; restart it"
            self._registry.request_restart(instance, reason)
            self._log_given_up(instance, reason, first=self._peer_view.report_hung(instance, last_sign))
            self._fail_waiting(instance, "does not answer")
        return True

    def _start(self, instance: Instance, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"suspect {instance}")
        self._suspects[instance] = task
        task.add_done_callback(lambda ended: self._on_done(instance, ended))

    def _on_done(self, instance: Instance, task: asyncio.Task[None]) -> None:
        del self._suspects[instance]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Stall detection for %s failed", instance, exc_info=error)

    async def _suspect(self, instance: Instance, remaining: float) -> None:
        """Half of the deadline has passed; the engine's counters decide within the ``remaining`` seconds."""
        progress = instance.progress
        if not await self._is_stalled(instance, remaining):
            progress.idle_since = self._registry.now()
            return
        idle = progress.stalled_for(self._registry.now())
        waiting = len(progress.waiting())
        reason = f"stalled: no output and no scheduler step for {idle:.3g} s with {waiting} requests waiting"
        log.error("%s is frozen: %s", instance, reason)
        self._registry.freeze(instance, reason, first=self._peer_view.report_stall(instance))
        await self._recover(instance, reason)

    async def _join(self, instance: Instance) -> None:
        """Another worker has found that it is stalled."""
        reason = "stalled, as another worker found"
        self._registry.freeze(instance, reason, first=False)
        await self._recover(instance, reason, found_here=False)

    async def _recover(self, instance: Instance, reason: str, found_here: bool = True) -> None:
        """Free it by replays, or give it up and wait until it makes progress on its own."""
        progress = instance.progress
        if instance.role is Role.DECODE and not self._peer_view.given_up(instance):
            helped = await replay_until_progress(instance, self, self._peer_view, self._replayed)
            if instance.state in (State.READY, State.PROBING):
                return
            if helped and instance.state is State.FROZEN:
                log.warning("%s makes progress again after %d replayed prefills", instance, instance.replays)
                self._registry.unfreeze(instance, "makes progress again after replayed prefills")
                return
            outcome = "replayed prefills did not help" if progress.replay_candidates() else "no prefill to replay"
            reason = f"{reason}; {outcome}"
        self._give_up(instance, f"{reason}; restart it")
        await self._until_progress(instance, found_here)

    async def _is_stalled(self, instance: Instance, within: float) -> bool:
        """Whether the engine makes no progress for ``within`` seconds.

        One without counters counts as stalled only if a waiting leg expects output.
        """
        before = await self.snapshot(instance)
        if before.counters is None or await self.progressed(instance, before, within):
            return False
        if instance.state is not State.READY:
            return False
        return bool(before.counters) or any(pending.expects_output for pending in instance.progress.waiting())

    async def snapshot(self, instance: Instance) -> ProgressSnapshot:
        """The progress of the engine so far."""
        return ProgressSnapshot(_outputs(instance), await self._counters(instance))

    async def progressed(self, instance: Instance, snapshot: ProgressSnapshot, within: float) -> bool:
        """Whether the engine makes progress after ``snapshot``, within that many seconds."""
        end = self._registry.now() + within
        while True:
            remaining = end - self._registry.now()
            await asyncio.sleep(max(0.0, min(within / _POLLS, remaining)))
            counters = await self._counters(instance)
            instance.progress.peer_outputs = self._peer_view.outputs(instance)
            if _outputs(instance) != snapshot.outputs:
                return True
            if counters is not None and snapshot.counters not in (None, counters):
                return True
            if remaining <= 0:
                return False

    async def _counters(self, instance: Instance) -> tuple[bytes, ...] | None:
        """The engine's counters; empty when its /metrics have none, None when they do not answer."""
        metrics = await read_metrics(self._upstream, instance, self._headers)
        return None if metrics is None else engine_counters(metrics)

    def _give_up(self, instance: Instance, reason: str) -> None:
        """Request its restart, and fail the legs that wait for it."""
        self._registry.request_restart(instance, reason)
        self._log_given_up(instance, reason, first=not self._peer_view.given_up(instance))
        self._peer_view.give_up(instance)
        pendings = self._fail_waiting(instance, "is stalled")
        if instance.role is Role.PREFILL and pendings and (receiver := pendings[0].receiver) is not None:
            self._check_receiver(instance, receiver)

    def _log_given_up(self, instance: Instance, reason: str, first: bool) -> None:
        """Log at level ERROR in the first worker that gives it up, at DEBUG in the others."""
        log.log(logging.ERROR if first else logging.DEBUG, "%s is given up: %s", instance, reason)

    def _fail_waiting(self, instance: Instance, what: str) -> list[PendingResponse]:
        """Fail all legs on it, which ends their requests or moves them to another pair."""
        error = EngineFrozen(f"The {instance.role.value} instance {what}.")
        return instance.progress.fail(error)

    def _check_receiver(self, prefill: Instance, receiver: Lease) -> None:
        """Give up the decode of a stalled prefill when it is not the first such prefill."""
        # A prefill that sent to a process that has ended does not wait for the process after it.
        if not receiver.still_ready:
            return
        decode = receiver.instance
        if self._peer_view.report_blocked_prefill(prefill, decode) >= _MIN_BLOCKED_PREFILLS:
            # Its waiting legs are not failed: it may still answer requests whose KV it has received.
            first = self._peer_view.report_stall(decode)
            self._registry.freeze(decode, "prefills that send to it are stalled", first=first)
            reason = "prefills that send to it are stalled: it receives no KV; restart it"
            self._registry.request_restart(decode, reason)
            self._log_given_up(decode, reason, first=not self._peer_view.given_up(decode))
            self._peer_view.give_up(decode)

    async def _until_progress(self, instance: Instance, found_here: bool) -> None:
        # Where another worker has given up a decode whose KV listener is dead, steps would prove nothing.
        before = await self.snapshot(instance)
        while instance.state is State.FROZEN:
            moved = await self.progressed(instance, before, self._shortest)
            if found_here and not moved and not instance.progress.pending and instance.state is State.FROZEN:
                await self._request_step(instance)
            if moved and instance.state is State.FROZEN:
                log.warning("%s makes progress again without replays", instance)
                if instance.breaker.trip(self._registry.now()):
                    self._registry.breaker_changed(instance)
                self._registry.unfreeze(instance, "makes progress again")

    async def _request_step(self, instance: Instance) -> None:
        """Have an idle engine generate one token, since only a step shows that it makes progress.

        One prompt token is safe with every protocol: a decode of P2pNcclConnector waits for the KV of all tokens but
        the last (vLLM 0.9.2 - 0.23, ``p2p_nccl_connector.py``, ``get_num_new_matched_tokens``). A prefill of
        P2pNcclConnector needs a decode to send to. Its legs are never cancelled, so it is not idle while it is stalled.
        """
        if instance.role is Role.PREFILL and not instance.kind.computes:
            return
        body = json.dumps({"model": instance.default_model, "prompt": [1], "max_tokens": 1}).encode()
        try:
            answer = await self._upstream.request(
                "POST", instance, "/v1/completions", headers=self._headers + b"content-type: application/json\r\n",
                body=body, idle_timeout=self._shortest, leg=instance.role.value, until=ReadUntil.COMPLETE,
            )  # fmt: skip
        except ProxyError:
            return
        # An engine without counters shows it by its answer alone.
        instance.progress.outputs += answer.status == 200


def _outputs(instance: Instance) -> int:
    return instance.progress.outputs + instance.progress.peer_outputs
