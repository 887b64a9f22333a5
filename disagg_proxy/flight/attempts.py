"""Which pair serves a request, and when another one is tried. The rule and its reasons: docs/retry.md.

Another pair always means a new id: KV that an earlier prefill may have sent belongs to the earlier id. Tries are
bounded, and only made while the client waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.pairing import Pair, Pairing
from disagg_proxy.errors import ProxyError
from disagg_proxy.flight.legs import Legs

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.05
"""Seconds before the second try, doubled before each further one."""


class Attempts:
    """The tries of one request.

    Args:
        first: the legs to begin with.
        make: legs for a pair; takes places on its instances.
        tries: pairs that are tried at most.
    """

    def __init__(
        self, first: Legs, make: Callable[[Pair], Legs], pairing: Pairing, model: str | None, tries: int
    ) -> None:
        self._make = make
        self._pairing = pairing
        self._model = model
        self._left = tries - 1
        self._pause = _FIRST_PAUSE
        self._failed: set[Instance] = set()
        self.legs = first

    async def another(self, failed: Instance, waiting: Callable[[], bool], suspect: Instance | None = None) -> bool:
        """Set up the legs of another pair without ``failed``; False when there is none, or no try left.

        The places of the pair before are given back by the caller.

        Args:
            waiting: whether the client still does.
            suspect: an instance to be left out too, where there is another.
        """
        self._failed.add(failed)
        if self._left <= 0 or not self._choose(suspect):
            return False
        self._left -= 1
        await asyncio.sleep(self._pause)
        self._pause *= 2
        # The pause may have changed who is there.
        pair = self._choose(suspect)
        if pair is None or not waiting():
            return False
        log.info("%s failed a request; another try on %s and %s", failed, pair.prefill, pair.decode)
        self.legs = self._make(pair)
        return True

    def _choose(self, suspect: Instance | None) -> Pair | None:
        for without in ({*self._failed, suspect}, self._failed) if suspect else (self._failed,):
            try:
                return self._pairing.choose(self._model, without=without)
            except ProxyError:
                continue
        return None
