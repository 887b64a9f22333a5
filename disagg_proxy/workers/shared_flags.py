"""What workers find out about instances and operators ask for them, as words that all look at.

Each fact is the time at which somebody said it, and the newest of contrary ones holds: an engine is frozen when the
newest FROZEN is later than the newest MOVED, an instance is drained when DRAINED is later than UNDRAINED. So nothing is
lost with a message, a worker that was stopped catches up by looking, and one that is new knows all at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.health.recovery import MAX_REPLAYS
from disagg_proxy.workers.shared_table import FlagColumn, Row, SharedTable, now

NOTHING = 2**62
"""DISTANCE of a worker that has nothing to replay."""

_BITS = 62
_LOOK = 0.05
_JOIN_WITHIN = 1.5
"""Seconds between two looks at whose turn it is, and those that others get to join a recovery."""


class SharedFlags:
    """One worker's part (:class:`disagg_proxy.health.peer_view.PeerView`).

    Args:
        poke: makes the others look.
    """

    def __init__(self, table: SharedTable, worker: int, registry: Registry, poke: Callable[[], None]) -> None:
        self._table = table
        self._worker = worker
        self._own = table.rows[worker]
        self._registry = registry
        self._poke = poke
        self._standing: set[Instance] = set()
        registry.watch(changed=self._on_change, ended=self._on_end)

    # -- drained by an operator

    def drain(self, instance: Instance, draining: bool) -> None:
        """Ask it of all."""
        self._registry.drain(instance, draining)
        if instance.slot >= 0:
            preference = max(now(), self._asked(instance.slot) + 1)
            self._own.set_mark(instance.slot, FlagColumn.DRAINED if draining else FlagColumn.UNDRAINED, preference)
            self._own.set_mark(instance.slot, FlagColumn.SEEN, preference)
            self._poke()

    def follow_drain(self, instance: Instance) -> None:
        """Do what was asked last, by whomever."""
        slot = instance.slot
        drained, undrained = (
            self._table.newest(slot, FlagColumn.DRAINED),
            self._table.newest(slot, FlagColumn.UNDRAINED),
        )
        newest = max(drained, undrained)
        if newest == self._own.mark(slot, FlagColumn.SEEN):
            return
        if instance.draining != (drained > undrained):
            self._registry.drain(instance, drained > undrained)
        self._own.set_mark(slot, FlagColumn.SEEN, newest)
        self._poke()

    def all_follow(self, instance: Instance) -> bool:
        """Whether every worker does what was asked last, those included that do not go round now."""
        slot = instance.slot
        if slot < 0:
            return True
        newest = self._asked(slot)
        return all(row.mark(slot, FlagColumn.SEEN) >= newest or not any(row.head) for row in self._table.workers)

    def _asked(self, slot: int) -> int:
        return max(self._table.newest(slot, FlagColumn.DRAINED), self._table.newest(slot, FlagColumn.UNDRAINED))

    # -- stalled engines

    def follow_thaw(self, instance: Instance) -> None:
        """Somebody has seen it move again."""
        if instance.state is State.FROZEN and self._round(instance.slot) and not self.frozen(instance):
            self._registry.unfreeze(instance, "makes progress again, as another worker has seen")

    def _on_change(self, instance: Instance) -> None:
        if instance.state is State.FROZEN:
            self._standing.add(instance)
        elif instance in self._standing:
            self._standing.discard(instance)
            if self.frozen(instance):
                self._own.set_mark(instance.slot, FlagColumn.MOVED, now())
                self._poke()

    def _on_end(self, instance: Instance) -> None:
        if instance.slot >= 0:
            self._own.set_mark(instance.slot, FlagColumn.BLAMED, 0)

    def outputs(self, instance: Instance) -> int:
        """Parts of answers that the others have got from it; tells them how many came here."""
        slot = instance.slot
        if slot < 0:
            return 0
        self._own.set_mark(slot, FlagColumn.MOVES, instance.progress.outputs)
        return sum(row.mark(slot, FlagColumn.MOVES) for row in self._table.workers if row is not self._own)

    def frozen(self, instance: Instance) -> bool:
        """Whether somebody has found that it is stalled, and nobody has seen it move since."""
        slot = instance.slot
        return slot >= 0 and self._table.newest(slot, FlagColumn.FROZEN) > self._table.newest(slot, FlagColumn.MOVED)

    def _round(self, slot: int) -> int:
        return self._table.newest(slot, FlagColumn.FROZEN)

    def report_stall(self, instance: Instance) -> bool:
        """It is stalled. Whether nobody has said so before."""
        if instance.slot < 0:
            return True
        if self.frozen(instance):
            return False
        self._own.set_mark(instance.slot, FlagColumn.FROZEN, now())
        self._poke()
        return True

    def given_up(self, instance: Instance) -> bool:
        """Whether somebody has decided that nothing but a restart is left."""
        slot = instance.slot
        return slot >= 0 and 0 < self._round(slot) <= self._table.newest(slot, FlagColumn.GIVEN_UP)

    def give_up(self, instance: Instance) -> None:
        """Nothing but a restart is left."""
        if instance.slot >= 0 and not self.given_up(instance):
            self._own.set_mark(instance.slot, FlagColumn.GIVEN_UP, self._round(instance.slot))
            self._poke()

    def report_hung(self, instance: Instance, last_sign: float) -> bool:
        """Report that its process hangs. Returns whether no other worker has reported that since ``last_sign``."""
        if instance.slot < 0:
            return True
        first = self._table.newest(instance.slot, FlagColumn.HUNG) <= last_sign * 1e9
        self._own.set_mark(instance.slot, FlagColumn.HUNG, now())
        return first

    async def may_replay(self, instance: Instance, distance: float | None) -> bool:
        """Whether this worker shall replay its best candidate now, which is so unlikely (in seconds).

        The likeliest of all workers' goes first, one at a time. False when nobody has any left, when there were
        enough, or when it is decided otherwise.
        """
        slot, own = instance.slot, self._own
        if slot < 0:
            return distance is not None
        this_round = self._round(slot)
        if own.mark(slot, FlagColumn.ROUND) != this_round:
            own.set_mark(slot, FlagColumn.TRIED, 0)
        mine = NOTHING if distance is None else min(int(distance * 1e9), NOTHING - 1)
        own.set_mark(slot, FlagColumn.DISTANCE, mine)
        own.set_mark(slot, FlagColumn.ROUND, this_round)
        late = self._registry.now() + _JOIN_WITHIN
        while instance.state is State.FROZEN and self._round(slot) == this_round and not self.given_up(instance):
            others = self._others()
            joined = [row for row in others if row.mark(slot, FlagColumn.ROUND) == this_round]
            if len(joined) == len(others) or self._registry.now() >= late:
                if sum(row.mark(slot, FlagColumn.TRIED) for row in (own, *joined)) >= MAX_REPLAYS:
                    return False
                best = min((row.mark(slot, FlagColumn.DISTANCE) for row in joined), default=NOTHING)
                if mine == best == NOTHING:
                    return False
                if mine < best or (mine == best and self._is_first(slot, mine, joined)):
                    own.set_mark(slot, FlagColumn.TRIED, own.mark(slot, FlagColumn.TRIED) + 1)
                    return True
            await asyncio.sleep(_LOOK)
        return False

    def _others(self) -> list[Row]:
        time = now()
        return [row for row in self._table.workers if row is not self._own and row.lives(time)]

    def _is_first(self, slot: int, mine: int, joined: list[Row]) -> bool:
        """Whether of those with the same distance this worker has the lowest number."""
        return not any(
            row in joined and row.mark(slot, FlagColumn.DISTANCE) == mine for row in self._table.rows[: self._worker]
        )

    def report_blocked_prefill(self, prefill: Instance, decode: Instance) -> int:
        """``prefill`` is stalled while it sends to ``decode``. How many do by now; two workers see the same one."""
        if prefill.slot < 0 or decode.slot < 0:
            decode.senders_frozen += 1
            return decode.senders_frozen
        bit = 1 << (prefill.slot % _BITS)
        self._own.set_mark(decode.slot, FlagColumn.BLAMED, self._own.mark(decode.slot, FlagColumn.BLAMED) | bit)
        seen = 0
        for row in self._table.workers:
            seen |= row.mark(decode.slot, FlagColumn.BLAMED)
        decode.senders_frozen = bin(seen).count("1")
        return decode.senders_frozen
