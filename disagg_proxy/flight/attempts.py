"""Which pair serves a request, and when another one is tried. The rule and its reasons: docs/retry.md.

Another pair always means a new id: KV that an earlier prefill may have sent belongs to the earlier id. Tries are
bounded, and only made while the client waits. They pass the same limits as new requests, or what a dead decode leaves
behind would fill the buffer of the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, Generic, Protocol, TypeVar

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.errors import ProxyError

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
"""Seconds before the second try, doubled before each further one."""


class Legs(Protocol):
    """What holds the places of a try."""

    def give_back(self) -> None: ...


class Order(Protocol):
    """What makes further tries possible."""

    def check(self, without: Collection[Instance]) -> None:
        """Raise a ProxyError when nobody can serve it without some instances."""

    async def again(self, without: Collection[Instance]) -> Any:
        """Legs without some instances, within the limits; may wait for room. Raises a ProxyError."""


L = TypeVar("L", bound=Legs)


class Attempts(Generic[L]):
    """The tries of one request.

    Args:
        first: the legs to begin with.
        tries: legs that are tried at most.
    """

    __slots__ = ("_failed", "_left", "_order", "_pause", "legs")

    def __init__(self, first: L, order: Order, tries: int) -> None:
        self._order = order
        self._left = tries - 1
        self._pause = _FIRST_PAUSE
        self._failed: frozenset[Instance] = frozenset()
        self.legs: L = first

    def possible(self, failed: Instance) -> bool:
        """Whether a try is left, and a pair without ``failed`` could serve it."""
        return self._left > 0 and self._serves({*self._failed, failed})

    async def another(self, failed: Instance, waiting: Callable[[], bool], suspect: Instance | None = None) -> bool:
        """Set up other legs without ``failed``; False when there are none, or no try is left.

        The places of the legs before are given back by the caller.

        Args:
            waiting: whether the client still does.
            suspect: an instance to be left out too, where there is another.
        """
        self._failed |= {failed}
        if self._left <= 0 or self._without(suspect) is None:
            return False
        self._left -= 1
        await asyncio.sleep(self._pause)
        self._pause *= 2
        # The pause may have changed who is there.
        without = self._without(suspect)
        if without is None or not waiting():
            return False
        log.info("%s failed a request; another try", failed)
        try:
            legs = await self._order.again(without)
        except ProxyError:
            return False
        if not waiting():
            legs.give_back()
            return False
        self.legs = legs
        return True

    def _without(self, suspect: Instance | None) -> Collection[Instance] | None:
        """Whom to leave out; None when nobody is left."""
        for without in ({*self._failed, suspect}, self._failed) if suspect else (self._failed,):
            if self._serves(without):
                return without
        return None

    def _serves(self, without: Collection[Instance]) -> bool:
        """Whether somebody can serve it without these."""
        try:
            self._order.check(without)
        except ProxyError:
            return False
        return True
