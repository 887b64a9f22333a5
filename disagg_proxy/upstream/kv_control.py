"""Telling an engine of this project's own connector something at its KV address (docs/connector.md): that a transfer is
over, or which other engine it will work with.

A decode that waits for KV of it computes at once, instead of at the end of its deadline. Rare, so each message has a
connection of its own; an engine that cannot be reached is left to its deadlines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from disagg_kv.control import Control
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Refused

log = logging.getLogger(__name__)


class KvControl:
    """Sends RELEASE and MEET.

    Args:
        secret: shared with the engines; empty without one.
        timeout: seconds for one connection.
    """

    def __init__(self, secret: str, timeout: float) -> None:
        self._secret = secret
        self._timeout = timeout

    async def release(self, address: str, transfer_id: str) -> None:
        """The transfer is over at that KV address. Never raises."""
        await self._say(address, lambda control: control.release(transfer_id))

    async def meet(self, decode: str, prefill: str) -> None:
        """The decode at one KV address shall connect to the prefill at the other. Never raises."""
        await self._say(decode, lambda control: control.meet(prefill))

    async def _say(self, address: str, what: Callable[[Control], Awaitable[None]]) -> None:
        try:
            control = await Control.open(address, self._secret, self._timeout)
            try:
                await what(control)
            finally:
                await control.close()
        except (OSError, asyncio.TimeoutError, WireError, Refused) as error:
            log.info("The KV port %s could not be told something: %s", address, error)
