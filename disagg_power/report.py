"""What one process reports of a GPU, as it travels in an engine's announcement and from the proxy's own reader.

On the wire a report is a map with short keys, of which only ``uuid`` is needed: ``t`` (the source's monotonic seconds),
``j`` (joules so far), ``src`` (``counter`` or ``integral``), ``w``, ``sm`` and ``mem`` (MHz), ``util`` (0 to 1), ``c``
(degrees Celsius), ``thr`` (bits of :data:`disagg_power.devices.THROTTLE_NAMES`), ``name``, ``index``, ``sim``, ``mig``,
``state`` and ``dev`` (integral over counter, less one). Unknown keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_GPUS = 8
"""Reports that one announcement carries; a proxy reads at most 4096 bytes of it."""
_MAX_TEXT = 64

Source = Literal["counter", "integral"]


@dataclass(frozen=True, slots=True)
class GpuReport:
    """One GPU at one moment; None: not known.

    Attributes:
        at: monotonic seconds of the process that read it.
        joules: the GPU's counter, or else the integral of its power since the source began to read it: only
            differences mean something.
        source: which of the two it is.
        power_w: as the GPU gives it.
        deviation: of the integral of power from the counter since the source began to read, where both exist.
        state: ``ok``; ``lost``; or ``no_figures`` where the GPU has neither counter nor power.
    """

    uuid: str
    at: float = 0.0
    joules: float | None = None
    source: Source = "counter"
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    throttle: int = 0
    name: str = ""
    index: int | None = None
    simulated: bool = False
    mig: bool = False
    state: str = "ok"
    deviation: float | None = None

    def packed(self) -> dict[str, Any]:
        """The map for the wire, without what is not known."""
        found: dict[str, Any] = {
            "uuid": self.uuid, "t": round(self.at, 3), "j": None if self.joules is None else round(self.joules, 3),
            "src": self.source, "w": _rounded(self.power_w), "sm": self.sm_clock_mhz, "mem": self.memory_clock_mhz,
            "util": self.utilization, "c": self.temperature_c, "thr": self.throttle or None, "name": self.name or None,
            "index": self.index, "sim": self.simulated or None, "mig": self.mig or None,
            "state": None if self.state == "ok" else self.state, "dev": self.deviation,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value is not None}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def unpacked(value: Any) -> tuple[GpuReport, ...]:
    """The reports of a message; what cannot be read is left out, as an engine serves without its meter too."""
    if not isinstance(value, list):
        return ()
    found = [_report(fields) for fields in value[:MAX_GPUS] if isinstance(fields, dict)]
    return tuple(report for report in found if report is not None)


def _report(fields: Mapping[Any, Any]) -> GpuReport | None:
    uuid = fields.get("uuid")
    if not isinstance(uuid, str) or not 0 < len(uuid) <= _MAX_TEXT:
        return None
    sm, memory, index, throttle = (_number(fields, key) for key in ("sm", "mem", "index", "thr"))
    name, state = fields.get("name"), fields.get("state")
    return GpuReport(
        uuid,
        at=_number(fields, "t") or 0.0,
        joules=_number(fields, "j"),
        source="integral" if fields.get("src") == "integral" else "counter",
        power_w=_number(fields, "w"),
        sm_clock_mhz=None if sm is None else int(sm),
        memory_clock_mhz=None if memory is None else int(memory),
        utilization=_number(fields, "util"),
        temperature_c=_number(fields, "c"),
        throttle=int(throttle or 0),
        name=name[:_MAX_TEXT] if isinstance(name, str) else "",
        index=None if index is None else int(index),
        simulated=fields.get("sim") is True,
        mig=fields.get("mig") is True,
        state=state if state in ("lost", "no_figures") else "ok",
        deviation=_number(fields, "dev"),
    )


def _number(fields: Mapping[Any, Any], key: str) -> float | None:
    """A finite number of at least -1; ``at`` and counters never are below 0."""
    value = fields.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1 <= value < 1e15:
        return None
    return float(value)
