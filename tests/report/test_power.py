"""Power, with a stand-in for NVML."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_report.power import NO_PYNVML, NoPower, PowerMeter, energy


class Nvml(SimpleNamespace):
    """pynvml with GPUs of fixed power; ``wanted`` readings set ``read``."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, watts: dict[str, float], wanted: int = 6) -> None:
        self.watts = watts
        self.count = 0
        self.wanted = wanted
        self.read = threading.Event()

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.watts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if str(index) not in self.watts:
            raise self.NVMLError("Invalid Argument")
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        return name

    def nvmlDeviceGetPowerUsage(self, handle: str) -> float:  # noqa: N802
        self.count += 1
        if self.count > self.wanted:
            self.read.set()
        if self.watts[handle] < 0:
            raise self.NVMLError("Not Supported")
        return self.watts[handle] * 1000


def stand_in(monkeypatch: pytest.MonkeyPatch, watts: dict[str, float]) -> Nvml:
    nvml = Nvml(watts)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    return nvml


def test_energy_is_the_integral_between_two_times() -> None:
    samples = [(0.0, 100.0), (1.0, 100.0), (2.0, 300.0), (3.0, 300.0)]
    assert energy(samples, 0, 3) == pytest.approx(100 + 200 + 300)
    assert energy(samples, 1.5, 2.5) == pytest.approx((200 + 300) / 2 * 0.5 + 300 * 0.5)
    assert energy(samples, -1, 0) == pytest.approx(100)  # before the first reading: as the first
    assert energy(samples, 3, 5) == pytest.approx(600)
    assert energy([], 0, 1) == 0 and energy(samples, 2, 2) == 0


def test_each_role_has_the_sum_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = stand_in(monkeypatch, {"0": 400.0, "1": 250.0, "GPU-abc": 50.0})
    meter = PowerMeter({"prefill": ["0"], "decode": ["1", "GPU-abc"], "none": []})
    meter.start()
    assert nvml.read.wait(20)
    found = meter.stop()
    assert set(found) == {"prefill", "decode"}
    assert found["prefill"].watts == pytest.approx(400) and found["decode"].watts == pytest.approx(300)
    assert found["decode"].gpus == ("1", "GPU-abc")
    assert found["decode"].joules == pytest.approx(300 * found["decode"].seconds)


def test_only_the_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = stand_in(monkeypatch, {"0": 100.0})
    meter = PowerMeter({"prefill": ["0"]})
    meter.start()
    assert nvml.read.wait(20)
    assert meter.stop((10.0, 12.5))["prefill"].joules == pytest.approx(250)


@pytest.mark.parametrize(
    ("watts", "why"), [({}, "Driver Not Loaded"), ({"1": 5.0}, "Invalid Argument"), ({"0": -1.0}, "Not Supported")]
)
def test_gpus_that_do_not_report_power(monkeypatch: pytest.MonkeyPatch, watts: dict[str, float], why: str) -> None:
    stand_in(monkeypatch, watts)
    with pytest.raises(NoPower, match=why):
        PowerMeter({"prefill": ["0"]})


def test_a_name_that_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {"0": 1.0})
    with pytest.raises(NoPower):
        PowerMeter({"prefill": ["MIG-7"]})


def test_without_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoPower) as raised:
        PowerMeter({"prefill": ["0"]})
    assert str(raised.value) == NO_PYNVML


def test_a_reading_that_fails_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = stand_in(monkeypatch, {"0": 100.0})
    meter = PowerMeter({"prefill": ["0"]})
    meter.start()
    nvml.watts["0"] = -1.0
    assert nvml.read.wait(20)
    assert meter.stop((0.0, 1.0))["prefill"].watts == pytest.approx(100)
