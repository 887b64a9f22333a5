"""The interface through which the reports of this package read a running proxy."""

from __future__ import annotations

from typing import Any, Protocol

from disagg_power.book import EnergyBook
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.config import Config
from disagg_proxy.runtime.shutdown import Shutdown
from disagg_proxy.telemetry.clock_status import ClockStatus


class ProxyState(Protocol):
    """What /stats, /metrics and the page read of :class:`disagg_proxy.services.Services`."""

    @property
    def config(self) -> Config: ...

    @property
    def registry(self) -> Registry: ...

    @property
    def selection(self) -> Selection: ...

    @property
    def energy(self) -> EnergyBook: ...

    @property
    def clock_status(self) -> ClockStatus: ...

    @property
    def shutdown(self) -> Shutdown: ...

    @property
    def worker(self) -> int | None:
        """The number of the worker that serves this report, None for a single process."""

    def placement_report(self) -> dict[str, Any]:
        """What the placement has learnt, as this process sees it."""

    def not_serving(self) -> str:
        """Why nothing is answered although requests wait; empty while the proxy serves."""

    def idle(self, instance: Instance) -> bool:
        """Whether ``instance`` can be stopped without harm to any client."""
