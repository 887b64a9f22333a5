"""Telling an engine of this project's own connector, at its KV address, that a transfer is over (docs/connector.md).

A decode that waits for KV of it computes at once, instead of at the end of its deadline. Rare, so each message has a
connection of its own; an engine that cannot be reached is left to its deadlines.
"""

from __future__ import annotations

import asyncio
import logging

from disagg_kv.control import Control
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Refused

log = logging.getLogger(__name__)


class KvControl:
    """Sends RELEASE.

    Args:
        secret: shared with the engines; empty without one.
        timeout: seconds for one connection.
    """

    def __init__(self, secret: str, timeout: float) -> None:
        self._secret = secret
        self._timeout = timeout

    async def release(self, address: str, transfer_id: str) -> None:
        """The transfer is over at that KV address. Never raises."""
        try:
            control = await Control.open(address, self._secret, self._timeout)
            try:
                await control.release(transfer_id)
            finally:
                await control.close()
        except (OSError, asyncio.TimeoutError, WireError, Refused) as error:
            log.info("The KV port %s was not told that a transfer is over: %s", address, error)
