"""The client of one flight: told one outcome, which may come too late. What is seen of it is in its record."""

from __future__ import annotations

from collections.abc import Callable

from disagg_proxy.errors import ProxyError
from disagg_proxy.flight.outcome import Outcome
from disagg_proxy.observe.record import Record

Told = Callable[[Outcome | ProxyError], None]
"""Called once with what the client gets, unless it leaves before."""


class Client:
    """Waits until it is told something, or :meth:`leave`.

    Attributes:
        record: gets what the client is told; closed by whoever calls :meth:`leave`, when all is counted.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._told: Told | None = None
        self.waits = True
        self.gone = False

    def listen(self, told: Told) -> None:
        """From now on there is somebody to tell."""
        self._told = told

    def tell(self, outcome: Outcome) -> bool:
        """Hand over an answer; False when nobody waits for it."""
        if self.waits:
            self.record.status = outcome.status
        return self._say(outcome)

    def fail(self, error: ProxyError) -> None:
        """Hand over an error, if somebody waits."""
        if self.waits:
            self.record.fail(error)
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
        return True
