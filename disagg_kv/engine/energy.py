"""Energy, power and clocks of this engine's GPUs, for its announcement. Reading needs no permission and sets nothing.

NVML comes from ``vllm.third_party.pynvml``, which every vLLM has. Whatever fails here, the engine serves: a thread of
its own reads, and what it cannot read is not announced. The fields are those of ``disagg_power/report.py``, which
this package does not import, as it must work where the proxy is not installed.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger("vllm.disagg_kv")

MAX_GPUS = 8
"""GPUs that one announcement describes: a proxy reads at most 4096 bytes of it."""
INTERVAL_SECONDS = 1.0
INTEGRAL_SECONDS = 0.1
"""Between two readings of a GPU without an energy counter, whose power is integrated."""
CURRENT_SECONDS = 5.0
"""A reading that is older is not announced: NVML does not answer."""
_LOST = {6, 15, 16, 28}
"""Codes of ``nvmlReturn_t`` (nvml.h): not found, lost, needs a reset, GPU not found."""

Fields = dict[str, Any]


class GpuReader:
    """Reads one GPU.

    Args:
        nvml: the module ``pynvml``.
        uuid: of the GPU, or of the MIG instance.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._uuid = uuid
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._fixed: Fields = {"uuid": uuid}
        if uuid.startswith("MIG-"):
            self._fixed["mig"] = True
        name = self._optional(lambda: nvml.nvmlDeviceGetName(self._handle))
        if name:
            self._fixed["name"] = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        index = self._optional(lambda: nvml.nvmlDeviceGetIndex(self._handle))
        if index is not None:
            self._fixed["index"] = index
        # The first name is that of CUDA 12 and newer, the second goes away with CUDA 14.
        self._reasons = (
            getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
            or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        )
        self._last: tuple[float, float] | None = None
        self._integral = 0.0
        self.counts = True

    def read(self) -> Fields:
        """The fields of one report."""
        nvml, handle, optional, reasons = self._nvml, self._handle, self._optional, self._reasons
        try:
            energy = optional(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            power = optional(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
            at = time.monotonic()
            busy = optional(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            fields: Fields = {
                **self._fixed,
                "t": round(at, 3),
                "w": None if power is None else power / 1e3,
                "sm": optional(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                "mem": optional(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                "util": None if busy is None else busy / 100,
                "c": optional(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                "thr": optional(lambda: int(reasons(handle))) or None,
            }
        except _Lost:
            self._last = None
            return {**self._fixed, "state": "lost"}
        self.counts = energy is not None
        if energy is not None:
            fields["j"] = energy / 1e3
        elif power is not None:
            fields["j"], fields["src"] = round(self._integrated(at, power / 1e3), 3), "integral"
        else:
            fields["state"] = "no_figures"
        return {key: value for key, value in fields.items() if value is not None}

    def _integrated(self, at: float, watts: float) -> float:
        if self._last is not None:
            before, earlier = self._last
            self._integral += (at - before) * (watts + earlier) / 2
        self._last = at, watts
        return self._integral

    def _optional(self, call: Callable[[], Any]) -> Any:
        """None for what this GPU does not have."""
        try:
            return call()
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) in _LOST:
                raise _Lost from None
            return None


class _Lost(Exception):
    """The GPU has gone away."""


class EnergyReader:
    """A thread that reads the GPUs.

    Args:
        gpus: makes the readers; called in the thread, so that a driver that hangs delays nothing else.
    """

    def __init__(self, gpus: Callable[[], Sequence[GpuReader | Unseen]]) -> None:
        self._open = gpus
        self._newest: tuple[float, list[Fields]] = (0.0, [])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disagg-kv-energy", daemon=True)
        self._thread.start()

    def reports(self) -> list[Fields]:
        """What was read last; nothing where it is not current."""
        at, found = self._newest
        return found if time.monotonic() - at <= CURRENT_SECONDS else []

    def close(self) -> None:
        """End the thread; one that hangs in the driver ends with the process."""
        self._stop.set()
        self._thread.join(0.5)

    def _run(self) -> None:
        try:
            gpus = self._open()
            while gpus:
                self._newest = time.monotonic(), [gpu.read() for gpu in gpus]
                every = INTERVAL_SECONDS if all(gpu.counts for gpu in gpus) else INTEGRAL_SECONDS
                if self._stop.wait(every):
                    return
        except Exception:
            self._newest = (0.0, [])
            logger.info("the energy of the GPUs is not announced", exc_info=True)


class Unseen:
    """A GPU of this engine that this process does not see: its energy is missing, and the proxy must know that."""

    counts = True

    def __init__(self, beside: str, rank: int) -> None:
        self._fields: Fields = {"uuid": f"{beside}+{rank}", "state": "no_figures"}

    def read(self) -> Fields:
        """The fields of one report, without figures."""
        return self._fields


def gpus_of_rank(first: int, tp: int) -> list[GpuReader | Unseen]:
    """The GPUs of an engine whose rank 0 runs in this process: those of its tensor parallel ranks.

    Args:
        first: device of rank 0; those of the others follow it, unless each process sees its own only.

    Raises:
        Exception: no NVML, or a GPU that it does not know.
    """
    import torch

    count = min(tp, torch.cuda.device_count() - first, MAX_GPUS)
    uuids = [_uuid(torch.cuda.get_device_properties(first + offset)) for offset in range(count)]
    nvml = importlib.import_module("vllm.third_party.pynvml")
    nvml.nvmlInit()
    found: list[GpuReader | Unseen] = [GpuReader(nvml, uuid) for uuid in uuids]
    return found if count == tp else [*found[: MAX_GPUS - 1], Unseen(uuids[0], count)]


def _uuid(properties: Any) -> str:
    """As NVML writes it; PyTorch has it without the prefix, since 2.4."""
    text = str(properties.uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"
