"""A pool for connections without sockets."""

from __future__ import annotations

from typing import Any

from disagg_proxy.http1.head_cache import HeadCache
from disagg_proxy.runtime.write_coalescing import WriteBatch
from disagg_proxy.upstream.connection import Connection


class Pool:
    """Counts the connections that come back."""

    def __init__(self, write_batch: WriteBatch) -> None:
        self.heads: HeadCache[Any] = HeadCache(ids=False)
        self.write_batch = write_batch
        self.free = 0

    def opened(self, connection: Connection) -> None: ...

    def released(self, connection: Connection) -> None:
        self.free += 1

    def closed(self, connection: Connection) -> None: ...
