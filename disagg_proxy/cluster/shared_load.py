"""What several processes of one proxy tell each other of their load: the seam, without which nothing is shared.

The counts of an :class:`Instance` are those of the whole proxy as last looked at. Whoever changes one of them for a
request of this process says so here as well.
"""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.instance import Instance

IN_FLIGHT, VISITS, KV_WAITING, KV_WAITING_BYTES = range(4)
"""The counts, in the order of :attr:`Instance.elsewhere`."""


class SharedLoad(Protocol):
    """Told of every change of a count by this process."""

    def add(self, instance: Instance, count: int, change: int) -> None: ...
