"""The proxy's own reader: GPUs of engines on this machine that do not report them, from their indices.

A thread of the process that owns the registration port, so that there is one however many workers serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from disagg_power.devices import Devices, PowerError
from disagg_power.meter import GpuMeter
from disagg_power.rapl import RaplMeter
from disagg_power.report import GpuReport

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.1
"""Between two readings: the integral of power needs as many as NVML gives."""
REPORT_SECONDS = 3.0
"""As engines report: the counter moves every 100 ms, which is 3 % of it."""

Reports = Mapping[str, Sequence[GpuReport]]
"""By HTTP address of the engine as configured; that of the host's packages is empty."""


class Reader:
    """Reads from :meth:`start` to :meth:`stop`.

    Args:
        gpus: indices or UUIDs of the GPUs by HTTP address of their engine.
        devices: opens the GPUs; called in the thread.
        deliver: called in the thread with the reports, every 3 s.
    """

    def __init__(
        self,
        gpus: Mapping[str, Sequence[str]],
        devices: Callable[[], Devices],
        deliver: Callable[[Reports], None],
        packages: Sequence[RaplMeter] = (),
    ) -> None:
        self._gpus = gpus
        self._open = devices
        self._deliver = deliver
        self._packages = packages
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-reader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a read that hangs in the driver is left to end with the process."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        devices = None
        try:
            devices = self._open()
            meters = {
                address: [GpuMeter(devices.find(word)) for word in words] for address, words in self._gpus.items()
            }
        except PowerError as error:
            log.info("Energy is not measured (POWER_GPUS): %s", error)
            if devices is not None:
                devices.close()
            return
        due = time.monotonic()
        while True:
            found: dict[str, list[GpuReport]] = {
                address: [meter.sample() for meter in group] for address, group in meters.items()
            }
            if time.monotonic() >= due:
                due = time.monotonic() + REPORT_SECONDS
                if self._packages:
                    found[""] = [package.sample() for package in self._packages]
                self._deliver(found)
            if self._ended.wait(SAMPLE_SECONDS):
                devices.close()
                return
