"""A pool for connections without sockets."""

from __future__ import annotations

from typing import Any

from disagg_proxy.outbox import Outbox
from disagg_proxy.protocol.heads import Heads
from disagg_proxy.upstream.connection import Connection


class Pool:
    """Counts the connections that come back."""

    def __init__(self, outbox: Outbox) -> None:
        self.heads: Heads[Any] = Heads(ids=False)
        self.outbox = outbox
        self.free = 0

    def came(self, connection: Connection) -> None: ...

    def idle(self, connection: Connection) -> None:
        self.free += 1

    def went(self, connection: Connection) -> None: ...
