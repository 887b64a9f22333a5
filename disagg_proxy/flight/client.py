"""The client of one flight: told one outcome, which may come too late, and counted once when it goes."""

from __future__ import annotations

from collections.abc import Callable

from disagg_proxy.errors import EngineDeadline, ProxyError
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.stats import Stats

Told = Callable[[Outcome | ProxyError], None]
"""Called once with what the client gets, unless it leaves before."""


class Client:
    """Counts as in flight from its creation to :meth:`leave`."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._begun_at = stats.clock()
        self._told: Told | None = None
        self._result = "client_left"
        self.waits = True
        self.gone = False
        stats.in_flight += 1

    def listen(self, told: Told) -> None:
        """From now on there is somebody to tell."""
        self._told = told

    def tell(self, outcome: Outcome) -> bool:
        """Hand over an answer; False when nobody waits for it."""
        return self._say(outcome)

    def fail(self, error: ProxyError) -> None:
        """Hand over an error, if somebody waits."""
        if self.waits:
            self._result = "deadline" if isinstance(error, EngineDeadline) else "engine_error"
            self._say(error)

    def _say(self, what: Outcome | ProxyError) -> bool:
        if not self.waits or self._told is None:
            return False
        self.waits = False
        told, self._told = self._told, None
        told(what)
        return True

    def leave(self) -> bool:
        """Its HTTP exchange is over, however it ended; False when that was known."""
        if self.gone:
            return False
        self.gone = True
        self.waits = False
        self._told = None
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
