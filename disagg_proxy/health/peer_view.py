"""What the other processes of this proxy know of an engine: the seam, and what holds where there are none.

Each process sees the answers to its own requests only. So what one finds out about an engine is told to all, and what
is done about it is done once: prefills are replayed in one order over all processes, and an engine is given up when
nobody has anything left to replay.
"""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.instance import Instance


class PeerView(Protocol):
    """The other processes."""

    def moves(self, instance: Instance) -> int:
        """Parts of answers that the others have got from it; tells them how many came here."""

    def frozen(self, instance: Instance) -> bool:
        """Whether somebody has found that it is stalled, and nobody has seen it move since."""

    def found(self, instance: Instance) -> bool:
        """It is stalled. Whether nobody has said so before."""

    def given_up(self, instance: Instance) -> bool:
        """Whether somebody has decided that nothing but a restart is left."""

    def give_up(self, instance: Instance) -> None:
        """Nothing but a restart is left."""

    async def turn(self, instance: Instance, distance: float | None) -> bool:
        """Whether a prefill shall be replayed from here now; returns when that is known.

        Args:
            distance: how unlikely the likeliest is to be what the engine waits for; None when there is nothing here.
        """

    def blame(self, prefill: Instance, decode: Instance) -> int:
        """``prefill`` is stalled while it sends to ``decode``. How many do by now."""


class NoPeers:
    """There are no other processes."""

    def moves(self, instance: Instance) -> int:
        return 0

    def frozen(self, instance: Instance) -> bool:
        return False

    def found(self, instance: Instance) -> bool:
        return True

    def given_up(self, instance: Instance) -> bool:
        return False

    def give_up(self, instance: Instance) -> None:
        return

    async def turn(self, instance: Instance, distance: float | None) -> bool:
        return distance is not None

    def blame(self, prefill: Instance, decode: Instance) -> int:
        decode.senders_frozen += 1
        return decode.senders_frozen
