"""Control messages to the KV ports of engines with this project's connector (docs/connector.md): RELEASE and MEET.

RELEASE ends a transfer, so that a decode that waits for its KV computes the prompt at once, not at its deadline. MEET
lets a decode connect to a prefill in advance. Both are rare, so each message has a connection of its own. Failures are
logged and otherwise ignored: the engine's own deadlines apply.
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

_MAX_CONNECTIONS = 8
"""Simultaneous connections to one KV port. An engine refuses more than its ``max_connections`` (64 by default),
and a lost prefill can have hundreds of transfers to release."""


class KvControl:
    """Sends RELEASE and MEET.

    Args:
        secret: shared with the engines; empty if they have none.
        timeout: seconds for establishing a connection; twice as long for a complete message.
    """

    def __init__(self, secret: str, timeout: float) -> None:
        self._secret = secret
        self.timeout = timeout
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def release(self, instance: Instance, transfer_id: str) -> None:
        """End a transfer on an instance. Never raises."""
        await self._send(instance, lambda control: control.release(transfer_id))

    async def meet(self, decode: Instance, prefill: Instance) -> None:
        """Let each rank of decode connect to the same rank of prefill. Never raises."""
        kv = prefill.kv
        if kv is not None:
            await self._send(decode, lambda control: control.meet(kv.text))

    async def _send(self, instance: Instance, message: Callable[[Control], Awaitable[None]]) -> None:
        """Send to every rank of the instance, each of which has its own KV port and transfers."""
        kv = instance.kv
        if kv is None:
            return
        host = kv.text.rpartition(":")[0]
        for port in range(kv.port, min(kv.port + instance.kind.ranks, 65536)):
            await self._send_to(instance, f"{host}:{port}", message)

    async def _send_to(self, instance: Instance, address: str, message: Callable[[Control], Awaitable[None]]) -> None:
        slots = self._slots.setdefault(address, asyncio.Semaphore(_MAX_CONNECTIONS))
        try:
            async with slots, within(2 * self.timeout):
                await self._send_once(address, message)
            instance.kv_control_refused = ""
        except Refused as refusal:
            level = logging.WARNING if instance.kv_control_refused != str(refusal) else logging.INFO
            instance.kv_control_refused = str(refusal)
            log.log(
                level, "KV port %s of %s refuses the control messages of this proxy: %s", address, instance, refusal
            )
        except (OSError, asyncio.TimeoutError, WireError) as error:
            log.info("Could not send a control message to KV port %s: %s", address, error)

    async def _send_once(self, address: str, message: Callable[[Control], Awaitable[None]]) -> None:
        control = await Control.open(address, self._secret, self.timeout)
        try:
            await message(control)
        finally:
            await control.close()
