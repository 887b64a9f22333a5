"""Notices stalled engines, and decides what becomes of them.

    suspected      somebody has waited longer than the learnt deadline while nothing else came from the engine
    confirmed      its own counters are stalled too, over half of the deadline; without any, only waits that tell count
    a decode       prefills of requests that it may wait for are replayed (health/recovery.py); if that helps it is back
    no help, or a prefill    FROZEN with ``restart_wanted``: its waiting decodes end with 504, its waiting prefills go
                   to another pair with a new id while the old legs run on, since a prefill is never cancelled
    moves again    back in service through a probe, with its breaker half open
    a second prefill freezes while it sends to one decode    that decode's KV listener is dead: it is taken out too
    a decode is lost       requests that still prefill for it move to another pair at once; their prefills, which block
                   in their sender, are judged by their counters without waiting for the learnt deadline
    neither pings nor answers, as after SIGSTOP    hung: ``restart_wanted`` after Registry.hung_after, and its waiting
                   requests end as above

With other processes of this proxy beside it an engine that one of them finds is frozen here too, and what is decided is
decided once (health/peer_view.py). One task looks at all instances; one more runs for each instance that is suspected.
"""

from __future__ import annotations

import asyncio
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
from disagg_proxy.health.recovery import replay_until_it_moves
from disagg_proxy.upstream import Upstream

log = logging.getLogger(__name__)

_LOOKS = 5
"""How often within the shortest deadline the instances are looked at; at least once a second."""

_POLLS = 10
"""How often an engine is asked for its counters while it is waited for."""

_SENDERS = 2
"""Prefills that are stalled while they send to one decode process before that one is taken to be the cause."""


@dataclass(frozen=True, slots=True)
class ProgressMark:
    """Where an engine stands: parts of answers so far, and its counters (None: it did not answer)."""

    moves: int
    counters: tuple[bytes, ...] | None


class StallDetector:
    """Watches every instance of a registry.

    Args:
        shortest, longest: bounds on the learnt deadline, in seconds.
        headers: lines that are sent along with GET /metrics, such as the engines' key.
        witness: the other processes of this proxy.
        replayed: told of an instance for which a prefill is repeated.
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
    ) -> None:
        self._registry = registry
        self._upstream = upstream
        self._shortest = shortest
        self._longest = longest
        self._headers = headers
        self._peer_view = peer_view or NoPeers()
        self._replayed = replayed
        self._pause = min(1.0, shortest / _LOOKS)
        self._looking: asyncio.Task[None] | None = None
        self._suspects: dict[Instance, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin to look."""
        self._looking = asyncio.get_running_loop().create_task(self._look_on(), name="watchdog")

    async def stop(self) -> None:
        """End all looking."""
        tasks = [*self._suspects.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self._pause)
            self.look()

    def look(self) -> None:
        """Look at all instances now."""
        for instance in self._registry.instances():
            self._look(instance)

    def _look(self, instance: Instance) -> None:
        now = self._registry.now()
        progress = instance.progress
        progress.moves_elsewhere = self._peer_view.moves(instance)
        moved = progress.look(now)
        if self._hung(instance, now):
            return
        blocked = self._leave(instance)
        if instance.state is State.READY and instance not in self._suspects and self._peer_view.frozen(instance):
            self._follow(instance, self._join(instance))
            return
        if moved or instance.state is not State.READY or instance in self._suspects:
            return
        deadline = (progress.blocked_deadline if blocked else progress.deadline)(self._shortest, self._longest)
        if progress.stalled_for(now) > deadline / 2:
            self._follow(instance, self._suspect(instance, deadline / 2))

    def _leave(self, instance: Instance) -> bool:
        """Let requests leave a prefill that is lost itself, or whose decode is; True for the latter."""
        if instance.role is not Role.PREFILL:
            return False
        blocked = instance.progress.blocked()
        own = instance.state is not State.READY and instance.silent
        for pending in instance.progress.waiting() if own else blocked:
            pending.move()
        return bool(blocked)

    def _hung(self, instance: Instance, now: float) -> bool:
        """Whether its process shows no sign of life for too long; its restart is then asked for, once."""
        if instance.last_answer is None or not instance.silent or instance.state in (State.READY, State.FROZEN):
            return False
        dead_for = now - max(instance.last_answer, instance.last_ping or 0.0, instance.progress.moved_at)
        if dead_for < self._registry.hung_after:
            return False
        if not instance.restart_wanted:
            pings = "" if instance.last_ping is None else "no ping and "
            reason = f"its process hangs: {pings}no answer from /health for {dead_for:.0f} s; restart it"
            self._registry.want_restart(instance, reason)
            log.error("%s is given up: %s", instance, reason)
            self._answer_waiting(instance, "does not answer")
        return True

    def _follow(self, instance: Instance, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"suspect {instance}")
        self._suspects[instance] = task
        task.add_done_callback(lambda ended: self._ended(instance, ended))

    def _ended(self, instance: Instance, task: asyncio.Task[None]) -> None:
        del self._suspects[instance]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("watching %s failed", instance, exc_info=error)

    async def _suspect(self, instance: Instance, rest: float) -> None:
        """Half of the deadline has passed; the engine's counters decide within the ``rest`` of it."""
        progress = instance.progress
        if not await self._stands_still(instance, rest):
            progress.still_since = self._registry.now()
            return
        silent = progress.stalled_for(self._registry.now())
        waiting = len(progress.waiting())
        said = f"stalled: no output and no scheduler step for {silent:.3g} s with {waiting} requests waiting"
        log.error("%s is frozen: %s", instance, said)
        self._registry.freeze(instance, said, first=self._peer_view.found(instance))
        await self._recover(instance, said)

    async def _join(self, instance: Instance) -> None:
        """Another process has found it."""
        said = "another worker found that its engine is stalled"
        self._registry.freeze(instance, said, first=False)
        await self._recover(instance, said)

    async def _recover(self, instance: Instance, said: str) -> None:
        """Set it going again, or give it up."""
        progress = instance.progress
        if instance.role is Role.DECODE and not self._peer_view.given_up(instance):
            helped = await replay_until_it_moves(instance, self, self._peer_view, self._replayed)
            if instance.state in (State.READY, State.PROBING):
                return
            if helped and instance.state is State.FROZEN:
                log.warning("%s moves again after %d replayed prefills", instance, instance.replays)
                self._registry.thaw(instance, "moves again after replayed prefills")
                return
            said += "; replayed prefills did not help" if progress.unanswered() else "; there is no prefill to replay"
        self._give_up(instance, f"{said}; restart it")
        await self._until_it_moves(instance)

    async def _stands_still(self, instance: Instance, within: float) -> bool:
        """An engine that shows no counters is judged by who waits for it."""
        mark = await self.mark(instance)
        if mark.counters is None or await self.moved(instance, mark, within) or instance.state is not State.READY:
            return False
        return bool(mark.counters) or any(pending.telling for pending in instance.progress.waiting())

    async def mark(self, instance: Instance) -> ProgressMark:
        """Where the engine stands now."""
        return ProgressMark(_moves(instance), await self._counters(instance))

    async def moved(self, instance: Instance, mark: ProgressMark, within: float) -> bool:
        """Whether the engine has moved since ``mark``, or does so within so many seconds."""
        end = self._registry.now() + within
        while True:
            left = end - self._registry.now()
            await asyncio.sleep(max(0.0, min(within / _POLLS, left)))
            counters = await self._counters(instance)
            instance.progress.moves_elsewhere = self._peer_view.moves(instance)
            if _moves(instance) != mark.moves:
                return True
            if mark.counters is not None and counters is not None and counters != mark.counters:
                return True
            if left <= 0:
                return False

    async def _counters(self, instance: Instance) -> tuple[bytes, ...] | None:
        """What changes with every step; empty when the engine shows nothing of it, None without an answer."""
        try:
            answer = await self._upstream.request(
                "GET", instance, "/metrics", headers=self._headers, idle_timeout=2.0, leg=instance.role.value
            )
            whole = await answer.read_all()
        except ProxyError:
            return None
        return engine_counters(whole.body) if whole.status == 200 else ()

    def _give_up(self, instance: Instance, reason: str) -> None:
        """Ask for its restart, and end the waits for it."""
        self._registry.want_restart(instance, reason)
        self._peer_view.give_up(instance)
        log.error("%s is given up: %s", instance, reason)
        pendings = self._answer_waiting(instance, "is stalled")
        if instance.role is Role.PREFILL and pendings and (receiver := pendings[0].receiver) is not None:
            self._blame_receiver(instance, receiver)

    def _answer_waiting(self, instance: Instance, what: str) -> list[PendingResponse]:
        """Notify all legs on it that nothing will come, which ends them or moves their requests."""
        error = EngineFrozen(f"The {instance.role.value} instance {what}.")
        return instance.progress.fail(error)

    def _blame_receiver(self, prefill: Instance, receiver: Lease) -> None:
        # The successor of a process that has ended is not what its prefills wait for.
        if not receiver.same_process:
            return
        decode = receiver.instance
        if self._peer_view.blame(prefill, decode) >= _SENDERS:
            # What it has taken in before it may still answer.
            first = self._peer_view.found(decode)
            self._registry.freeze(decode, "prefills that send to it are stalled", first=first)
            self._registry.want_restart(decode, "prefills that send to it are stalled: it takes in no KV; restart it")
            self._peer_view.give_up(decode)
            log.error("%s is given up: %s", decode, decode.reason)

    async def _until_it_moves(self, instance: Instance) -> None:
        mark = await self.mark(instance)
        while instance.state is State.FROZEN:
            if await self.moved(instance, mark, self._shortest) and instance.state is State.FROZEN:
                log.warning("%s moves again by itself", instance)
                if instance.breaker.trip(self._registry.now()):
                    self._registry.breaker_moved(instance)
                self._registry.thaw(instance, "moves again")


def _moves(instance: Instance) -> int:
    return instance.progress.moves + instance.progress.moves_elsewhere
