"""What the reports of this folder read from a running proxy."""

from __future__ import annotations

from typing import Protocol

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.config import Config
from disagg_proxy.runtime.shutdown import Shutdown


class ProxyState(Protocol):
    """The parts of :class:`disagg_proxy.services.Services` that /stats, /metrics and the page show."""

    @property
    def config(self) -> Config: ...

    @property
    def registry(self) -> Registry: ...

    @property
    def selection(self) -> Selection: ...

    @property
    def shutdown(self) -> Shutdown: ...

    @property
    def worker(self) -> int | None:
        """The number of the answering worker, None where the proxy is a single process."""

    def idle(self, instance: Instance) -> bool:
        """Whether ``instance`` could be stopped without loss to any client."""
