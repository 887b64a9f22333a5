"""Reports of GPUs on their way to the energy book: from announcements, and from this machine's own reader."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disagg_power.book import HOST, STALE_SECONDS, EnergyBook
from disagg_power.gpus import open_devices
from disagg_power.rapl import packages
from disagg_power.reader import Reader, Reports
from disagg_power.report import GpuReport, unpacked
from disagg_proxy.cluster.instance import Instance
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config

PackedReports = Mapping[str, Sequence[Mapping[str, Any]]]
"""Reports as plain values, by the key of the instance; those of the host under an empty key."""


class LocalReader:
    """Reads POWER_GPUS in a thread and delivers on the event loop. It does nothing without that setting.

    Args:
        deliver: called on the event loop, every 3 s.
    """

    def __init__(self, config: Config, deliver: Callable[[PackedReports], None]) -> None:
        self._deliver = deliver
        self._reader: Reader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if config.power_gpus and config.power_meter:
            gpus = {named.address.netloc: named.gpus for named in config.power_gpus}
            self._reader = Reader(gpus, lambda: open_devices(os.environ), self._take, packages())

    def start(self) -> None:
        """Start reading; the reports come on the running event loop."""
        self._loop = asyncio.get_running_loop()
        if self._reader is not None:
            self._reader.start()

    def stop(self) -> None:
        """Stop reading. May take a second, so not for the event loop."""
        if self._reader is not None:
            self._reader.stop()

    def _take(self, reports: Reports) -> None:
        packed = {key: [report.packed() for report in group] for key, group in reports.items()}
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, packed)


class PowerReports:
    """Takes reports into the book, each under the instance that it belongs to.

    Args:
        enabled: POWER_METER.
    """

    def __init__(self, registry: Registry, book: EnergyBook, enabled: bool) -> None:
        self._registry = registry
        self._book = book
        self._enabled = enabled
        self._announced: dict[str, float] = {}
        """When the instance last reported its own GPUs."""

    def announced(self, key: str, reports: Sequence[GpuReport]) -> None:
        """What an instance says of its own GPUs."""
        instance = self._registry.find(key) if reports and self._enabled else None
        if instance is not None:
            self._announced[key] = self._registry.now()
            self._take(instance, reports)

    def read(self, packed: PackedReports) -> None:
        """What this machine's reader has found; an instance that reports its GPUs itself knows better."""
        now = self._registry.now()
        for key, group in packed.items():
            reports = unpacked(list(group))
            if not key:
                self._book.take(HOST, "", reports, now, None)
            elif now - self._announced.get(key, -STALE_SECONDS) >= STALE_SECONDS:
                instance = self._registry.find(key)
                if instance is not None:
                    self._take(instance, reports)

    def _take(self, instance: Instance, reports: Sequence[GpuReport]) -> None:
        work = instance.requests_total if instance.idle else None
        self._book.take(instance.role.value, instance.key, reports, self._registry.now(), work)
