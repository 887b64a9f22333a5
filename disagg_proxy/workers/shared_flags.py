"""Drains, roles and stalls of instances, shared by all workers as flags in the shared table.

A flag is the time at which a worker set it, and of two opposite flags the newer one holds: an engine is stalled while
the newest FROZEN is later than the newest RECOVERED, an instance is drained while DRAINED is later than UNDRAINED. An
assigned role is one word that begins with its time, so the greatest one holds. No state depends on a message: a worker
that was stopped, or is new, only has to read the table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from disagg_proxy.cluster.assignment import Assignment, unpack
from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.health.recovery import MAX_REPLAYS
from disagg_proxy.workers.shared_table import FlagColumn, Row, SharedTable, now

NOTHING = 2**62
"""DISTANCE of a worker without a prefill to replay."""

_BITS = 62
_POLL_INTERVAL = 0.05
"""Seconds between two checks whose turn it is to replay."""

_JOIN_TIMEOUT = 1.5
"""Seconds within which the other workers join a recovery."""


class SharedFlags:
    """One worker's flags, and its view of all (:class:`disagg_proxy.health.peer_view.PeerView`).

    Args:
        notify: makes the other workers read the table.
    """

    def __init__(self, table: SharedTable, worker: int, registry: Registry, notify: Callable[[], None]) -> None:
        self._table = table
        self._worker = worker
        self._own = table.rows[worker]
        self._registry = registry
        self._notify = notify
        self._frozen: set[Instance] = set()
        registry.watch(changed=self._on_change, ended=self._on_end)

    # -- drains

    def drain(self, instance: Instance, draining: bool) -> None:
        """Drain or undrain ``instance`` in all workers."""
        self._registry.drain(instance, draining)
        if instance.slot >= 0:
            requested = max(now(), self._drain_requested(instance.slot) + 1)
            self._own.set_flag(instance.slot, FlagColumn.DRAINED if draining else FlagColumn.UNDRAINED, requested)
            self._own.set_flag(instance.slot, FlagColumn.DRAIN_APPLIED, requested)
            self._notify()

    def apply_drain(self, instance: Instance) -> None:
        """Apply the newest drain or undrain of any worker to this one."""
        slot = instance.slot
        drained = self._table.newest(slot, FlagColumn.DRAINED)
        undrained = self._table.newest(slot, FlagColumn.UNDRAINED)
        newest = max(drained, undrained)
        if newest == self._own.flag(slot, FlagColumn.DRAIN_APPLIED):
            return
        if instance.draining != (drained > undrained):
            self._registry.drain(instance, drained > undrained)
        self._own.set_flag(slot, FlagColumn.DRAIN_APPLIED, newest)
        self._notify()

    def drain_applied_by_all(self, instance: Instance) -> bool:
        """Whether every worker has applied the newest drain or undrain, unresponsive ones included."""
        slot = instance.slot
        if slot < 0:
            return True
        newest = self._drain_requested(slot)
        return all(
            row.flag(slot, FlagColumn.DRAIN_APPLIED) >= newest or not any(row.head) for row in self._table.workers
        )

    def _drain_requested(self, slot: int) -> int:
        return max(self._table.newest(slot, FlagColumn.DRAINED), self._table.newest(slot, FlagColumn.UNDRAINED))

    # -- assigned roles

    def assign(self, instance: Instance, assignment: Assignment) -> None:
        """Assign a role to ``instance`` in all workers."""
        slot = instance.slot
        if slot >= 0 and (newest := self._table.newest(slot, FlagColumn.ROLE)) >= assignment.pack():
            assignment = replace(assignment, at=unpack(newest).at + 0.001)
        self._registry.assign(instance, assignment)
        if slot >= 0:
            self._own.set_flag(slot, FlagColumn.ROLE, assignment.pack())
            self._own.set_flag(slot, FlagColumn.ROLE_APPLIED, assignment.pack())
            self._notify()

    def apply_role(self, instance: Instance) -> None:
        """Apply the newest assignment of any worker to this one."""
        slot = instance.slot
        newest = self._table.newest(slot, FlagColumn.ROLE)
        if not newest:
            return
        if instance.assignment is None or instance.assignment.pack() != newest:
            self._registry.assign(instance, unpack(newest))
        if self._own.flag(slot, FlagColumn.ROLE_APPLIED) != newest:
            self._own.set_flag(slot, FlagColumn.ROLE_APPLIED, newest)
            self._notify()

    def role_applied_by_all(self, instance: Instance) -> bool:
        """Whether every worker has applied the newest assignment, unresponsive ones included."""
        slot = instance.slot
        if slot < 0:
            return True
        newest = self._table.newest(slot, FlagColumn.ROLE)
        return all(
            row.flag(slot, FlagColumn.ROLE_APPLIED) >= newest or not any(row.head) for row in self._table.workers
        )

    def report_prefill_wait(self, instance: Instance, seconds: float) -> None:
        """Publish how long this worker's prompts wait for prefill on ``instance``."""
        self._own.set_flag(instance.slot, FlagColumn.PREFILL_WAIT, round(seconds * 1000))

    def prefill_wait(self, instance: Instance) -> float:
        """Seconds that prompts wait for prefill on ``instance``: the longest of all workers, as last published."""
        return 0.0 if instance.slot < 0 else self._table.newest(instance.slot, FlagColumn.PREFILL_WAIT) / 1000

    # -- stalled engines

    def apply_recovery(self, instance: Instance) -> None:
        """End the stall of ``instance`` here if another worker has seen it recover."""
        if instance.state is State.FROZEN and self._round(instance.slot) and not self.frozen(instance):
            self._registry.unfreeze(instance, "makes progress again, as seen by another worker")

    def _on_change(self, instance: Instance) -> None:
        if instance.state is State.FROZEN:
            self._frozen.add(instance)
        elif instance in self._frozen:
            self._frozen.discard(instance)
            if self.frozen(instance):
                self._own.set_flag(instance.slot, FlagColumn.RECOVERED, now())
                self._notify()

    def _on_end(self, instance: Instance) -> None:
        if instance.slot >= 0:
            self._own.set_flag(instance.slot, FlagColumn.STALLED_SENDERS, 0)

    def outputs(self, instance: Instance) -> int:
        """Publish this worker's chunks from ``instance``. Returns those that the other workers have received."""
        slot = instance.slot
        if slot < 0:
            return 0
        self._own.set_flag(slot, FlagColumn.PROGRESS, instance.progress.outputs)
        return sum(row.flag(slot, FlagColumn.PROGRESS) for row in self._table.workers if row is not self._own)

    def frozen(self, instance: Instance) -> bool:
        """Whether a worker has found ``instance`` stalled, and none has seen it recover since."""
        slot = instance.slot
        return slot >= 0 and self._table.newest(slot, FlagColumn.FROZEN) > self._table.newest(
            slot, FlagColumn.RECOVERED
        )

    def _round(self, slot: int) -> int:
        return self._table.newest(slot, FlagColumn.FROZEN)

    def report_stall(self, instance: Instance) -> bool:
        """Report ``instance`` as stalled. Returns False if it was reported already."""
        if instance.slot < 0:
            return True
        if self.frozen(instance):
            return False
        self._own.set_flag(instance.slot, FlagColumn.FROZEN, now())
        self._notify()
        return True

    def given_up(self, instance: Instance) -> bool:
        """Whether a worker has decided that only a restart can recover ``instance``."""
        slot = instance.slot
        return slot >= 0 and 0 < self._round(slot) <= self._table.newest(slot, FlagColumn.GIVEN_UP)

    def give_up(self, instance: Instance) -> None:
        """Decide for all workers that only a restart can recover ``instance``."""
        if instance.slot >= 0 and not self.given_up(instance):
            self._own.set_flag(instance.slot, FlagColumn.GIVEN_UP, self._round(instance.slot))
            self._notify()

    def report_hung(self, instance: Instance, last_sign: float) -> bool:
        """Report that its process hangs. Returns whether no other worker has reported that since ``last_sign``."""
        if instance.slot < 0:
            return True
        first = self._table.newest(instance.slot, FlagColumn.HUNG) <= last_sign * 1e9
        self._own.set_flag(instance.slot, FlagColumn.HUNG, now())
        return first

    async def may_replay(self, instance: Instance, distance: float | None) -> bool:
        """Wait for this worker's turn to replay a prefill. The likeliest candidate of all workers goes first.

        Args:
            distance: of this worker's best candidate in seconds, smaller is likelier; None without one.

        Returns:
            True to replay that candidate now; False when no worker has one left, when the limit of replays is
            reached, or when the stall has ended or was given up.
        """
        slot, own = instance.slot, self._own
        if slot < 0:
            return distance is not None
        this_round = self._round(slot)
        if own.flag(slot, FlagColumn.ROUND) != this_round:
            own.set_flag(slot, FlagColumn.REPLAYS, 0)
        own_distance = NOTHING if distance is None else min(int(distance * 1e9), NOTHING - 1)
        own.set_flag(slot, FlagColumn.DISTANCE, own_distance)
        own.set_flag(slot, FlagColumn.ROUND, this_round)
        deadline = self._registry.now() + _JOIN_TIMEOUT
        while instance.state is State.FROZEN and self._round(slot) == this_round and not self.given_up(instance):
            others = self._others()
            joined = [row for row in others if row.flag(slot, FlagColumn.ROUND) == this_round]
            if len(joined) == len(others) or self._registry.now() >= deadline:
                if (
                    own.flag(slot, FlagColumn.REPLAYS) + sum(row.flag(slot, FlagColumn.REPLAYS) for row in joined)
                    >= MAX_REPLAYS
                ):
                    return False
                best = min((row.flag(slot, FlagColumn.DISTANCE) for row in joined), default=NOTHING)
                if own_distance == best == NOTHING:
                    return False
                if own_distance < best or (own_distance == best and self._is_first(slot, own_distance, joined)):
                    own.set_flag(slot, FlagColumn.REPLAYS, own.flag(slot, FlagColumn.REPLAYS) + 1)
                    return True
            await asyncio.sleep(_POLL_INTERVAL)
        return False

    def _others(self) -> list[Row]:
        time = now()
        return [row for row in self._table.workers if row is not self._own and row.is_alive(time)]

    def _is_first(self, slot: int, distance: int, joined: list[Row]) -> bool:
        """Whether this worker has the lowest number of those with the same distance."""
        return not any(
            row in joined and row.flag(slot, FlagColumn.DISTANCE) == distance
            for row in self._table.rows[: self._worker]
        )

    def report_blocked_prefill(self, prefill: Instance, decode: Instance) -> int:
        """Report that ``prefill`` stalled while sending to ``decode``. Returns the number of such prefills."""
        if prefill.slot < 0 or decode.slot < 0:
            decode.senders_frozen += 1
            return decode.senders_frozen
        bit = 1 << (prefill.slot % _BITS)
        self._own.set_flag(
            decode.slot, FlagColumn.STALLED_SENDERS, self._own.flag(decode.slot, FlagColumn.STALLED_SENDERS) | bit
        )
        seen = 0
        for row in self._table.workers:
            seen |= row.flag(decode.slot, FlagColumn.STALLED_SENDERS)
        decode.senders_frozen = bin(seen).count("1")
        return decode.senders_frozen
