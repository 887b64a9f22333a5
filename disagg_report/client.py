"""Interface between a sweep and its load generators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from disagg_report.records import Measurement

Watch = Callable[[int, int, int], None]
"""Called with the numbers of answered, failed and planned requests when they change."""


class ClientFailed(Exception):
    """The load generator itself failed; the text names the reason and the log."""


class Client(Protocol):
    """A load generator.

    Attributes:
        name: its name in the report.
    """

    name: str

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """Measure one rate, or the part of it until ``stop`` is set. Raises ClientFailed."""
        ...

    def window(self) -> tuple[float, float] | None:
        """Begin and end (``time.monotonic``) of the last rate's load; None: the complete call of :meth:`measure`."""
        ...
