"""What a load generator is to a sweep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from disagg_report.records import Measurement

Watch = Callable[[int, int, int], None]
"""Told answered, failed and planned requests as they change."""


class ClientFailed(Exception):
    """A load generator itself failed; the text says why and where to look."""


class Client(Protocol):
    """Sends one rate after the other.

    Attributes:
        name: as the report calls it.
    """

    name: str

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """Measure one rate, or as much of it as there is when ``stop`` is set. Raises ClientFailed."""
        ...

    def window(self) -> tuple[float, float] | None:
        """From when to when (``time.monotonic``) the last rate's load was there; None: all the time of the call."""
        ...
