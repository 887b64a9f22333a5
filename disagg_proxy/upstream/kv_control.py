"""Telling an engine of this project's own connector something at its KV address (docs/connector.md): that a transfer is
over, or which other engine it will work with.

A decode that waits for KV of it computes at once, instead of at the end of its deadline. Rare, so each message has a
connection of its own; an engine that cannot be reached is left to its deadlines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from disagg_kv.control import Control
from disagg_kv.protocol.frames import WireError
from disagg_kv.protocol.handshake import Refused
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.runtime.within import within

log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Connections to one KV port at the same time. An engine refuses more than its ``max_connections`` (64 by default),
and a lost prefill can have hundreds of transfers to release."""


class KvControl:
    """Sends RELEASE and MEET.

    Args:
        secret: shared with the engines; empty without one.
        timeout: seconds for one connection.
    """

    def __init__(self, secret: str, timeout: float) -> None:
        self._secret = secret
        self._timeout = timeout
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def release(self, instance: Instance, transfer_id: str) -> None:
        """The transfer is over on that instance. Never raises."""
        await self._say(instance, lambda control: control.release(transfer_id))

    async def meet(self, decode: Instance, prefill: Instance) -> None:
        """Decode shall connect to prefill, each of its ranks to the same one there. Never raises."""
        kv = prefill.kv
        if kv is not None:
            await self._say(decode, lambda control: control.meet(kv.text))

    async def _say(self, instance: Instance, what: Callable[[Control], Awaitable[None]]) -> None:
        """To every rank: each waits, holds and connects for itself."""
        kv = instance.kv
        if kv is None:
            return
        host = kv.text.rpartition(":")[0]
        for port in range(kv.port, min(kv.port + instance.kind.ranks, 65536)):
            await self._say_to(f"{host}:{port}", what)

    async def _say_to(self, address: str, what: Callable[[Control], Awaitable[None]]) -> None:
        slots = self._slots.setdefault(address, asyncio.Semaphore(_AT_ONCE))
        try:
            async with slots, within(2 * self._timeout):
                await self._once(address, what)
        except (OSError, asyncio.TimeoutError, WireError, Refused) as error:
            log.info("The KV port %s could not be told something: %s", address, error)

    async def _once(self, address: str, what: Callable[[Control], Awaitable[None]]) -> None:
        control = await Control.open(address, self._secret, self._timeout)
        try:
            await what(control)
        finally:
            await control.close()
