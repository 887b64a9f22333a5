"""Freeing KV whose decode will not come: one token of the same prompt is decoded under the same id and thrown away.

Only after a prefill that answered 200, and only while no decode of this id can have reached the instance; anything
else would stall it. A few at a time run on one decode, the others wait their turn. Tried again while the instance
cannot be reached or is busy, for as long as it is the process that holds the KV; while it is frozen they wait.
Measured on vLLM 0.21: 40 ms for 8,000 tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance, State
from disagg_proxy.errors import EngineFailed, EngineUnreachable, ProxyError
from disagg_proxy.flight.legs import Legs
from disagg_proxy.protocol.prefill_answer import prompt_tokens
from disagg_proxy.stats import Drains

log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Drains that run on one decode at the same time. Each loads the KV of a whole prompt."""

_PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 0.0)
"""Seconds between the tries."""

_FROZEN_PAUSE = 1.0
"""Seconds between two looks at a frozen decode."""

_BUSY = (429, 503)
"""Statuses with which an API server turns a request away before its engine knows of it."""


class Drainer:
    """Runs drains.

    Args:
        counts: what /stats shows.
        ended: told of the instance when a drain has ended, and why it failed; empty when the KV is freed.
    """

    def __init__(self, counts: Drains, ended: Callable[[Instance, str], None] = lambda instance, failure: None) -> None:
        self._counts = counts
        self._ended = ended
        self._turns: dict[str, asyncio.Semaphore] = {}

    async def drain(self, legs: Legs) -> None:
        """Free what waits on decode for ``legs``. Never raises."""
        self._counts.started += 1
        instance = legs.decode_lease.instance
        turn = self._turns.setdefault(instance.key, asyncio.Semaphore(_AT_ONCE))
        failure = "given up"
        self._counts.waiting += 1
        try:
            async with turn:
                failure = await self._try_on(legs)
        finally:
            self._counts.waiting -= 1
            self._ended(instance, failure)
            instance.drains += not failure
            if failure:
                self._counts.failed += 1
                instance.drains_failed += 1
                log.warning("KV of %s is not drained from %s: %s", legs.id.public, instance, failure)

    async def _try_on(self, legs: Legs) -> str:
        """Why it failed; empty when the KV is freed."""
        lease, failure = legs.decode_lease, ""
        for pause in _PAUSES:
            while lease.instance.state is State.FROZEN and not lease.process_ended:
                await asyncio.sleep(_FROZEN_PAUSE)
            if lease.process_ended:
                break
            if lease.instance.state is State.READY:
                try:
                    freed = await self._once(legs)
                except EngineUnreachable as error:
                    failure = error.message
                except ProxyError as error:
                    return error.message
                else:
                    self._counts.tokens += freed
                    self._counts.done += 1
                    return ""
            await asyncio.sleep(pause)
        if lease.process_ended:
            return "it went away, and the KV with it"
        return failure or "it was not ready for too long"

    async def _once(self, legs: Legs) -> int:
        """The tokens of the prompt that was freed.

        Raises:
            EngineUnreachable: it cannot have been received; another try may do.
            ProxyError: it may have been, and must not be repeated.
        """
        answer = await legs.send_drain()
        if answer.status in _BUSY:
            raise EngineUnreachable(f"it is busy ({answer.status})", refused=False)
        if answer.status != 200:
            raise EngineFailed(f"it answered {answer.status}")
        return prompt_tokens(answer.body)
