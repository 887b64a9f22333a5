"""The client of one flight: told one outcome, which may come too late, and counted once when it goes."""

from __future__ import annotations

import asyncio

from disagg_proxy.errors import EngineDeadline, ProxyError
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.stats import Stats


class Client:
    """Counts as in flight from its creation to :meth:`leave`."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._begun_at = stats.clock()
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._result = "client_left"
        self.gone = False
        stats.in_flight += 1

    @property
    def waits(self) -> bool:
        """Whether it has no outcome yet and is still there."""
        return not self._outcome.done()

    async def outcome(self) -> Outcome:
        """What it is told.

        Raises:
            ProxyError: the request ended without an answer of an instance.
        """
        return await self._outcome

    def tell(self, outcome: Outcome) -> bool:
        """Hand over an answer; False when nobody waits for it."""
        if self._outcome.done():
            return False
        self._outcome.set_result(outcome)
        return True

    def fail(self, error: ProxyError) -> None:
        """Hand over an error, if somebody waits."""
        if not self._outcome.done():
            self._result = "deadline" if isinstance(error, EngineDeadline) else "engine_error"
            self._outcome.set_exception(error)

    def leave(self) -> bool:
        """Its HTTP exchange is over, however it ended; False when that was known."""
        if self.gone:
            return False
        self.gone = True
        self._outcome.cancel()
        self._stats.in_flight -= 1
        self._stats.outcomes[self._result] += 1
        return True

    # -- what /stats shows of it

    def prefilled(self) -> None:
        """The prefill leg has its answer."""
        self._stats.prefill.add(self._stats.clock() - self._begun_at)

    def first_byte(self) -> None:
        """The answer begins."""
        self._stats.ttft.add(self._stats.clock() - self._begun_at)

    def complete(self) -> None:
        """The answer is whole."""
        self._result = "ok"
        self._stats.total.add(self._stats.clock() - self._begun_at)

    def cut(self) -> None:
        """The answer broke off."""
        if not self.gone:
            self._result = "cut"

    def refused(self) -> None:
        """The request itself was at fault."""
        self._result = "client_error"
