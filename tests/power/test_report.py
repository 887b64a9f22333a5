"""Reports survive the wire, and nothing that a sender may write there is an error."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_power.report import MAX_GPUS, GpuReport, unpacked

REPORT = GpuReport(
    "GPU-1", at=12.5, joules=1234.5, power_w=429.5, sm_clock_mhz=1980, memory_clock_mhz=3201, utilization=0.75,
    temperature_c=61.0, throttle=4, name="NVIDIA H200", index=3, simulated=True, mig=True, state="lost",
    deviation=-0.01,
)  # fmt: skip


@pytest.mark.parametrize("report", [REPORT, GpuReport("GPU-2"), GpuReport("GPU-3", source="integral", joules=0.0)])
def test_a_report_survives_the_wire(report: GpuReport) -> None:
    assert unpacked(msgpack.unpackb(msgpack.packb([report.packed()]))) == (report,)


def test_eight_reports_fit_into_an_announcement() -> None:
    packed = msgpack.packb({"power": [REPORT.packed()] * MAX_GPUS})
    assert len(packed) < 2000, "beside 2100 bytes of everything else, a proxy reads at most 4096"
    assert len(unpacked([REPORT.packed()] * (MAX_GPUS + 1))) == MAX_GPUS


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["uuid", "j", "w", "t", "sm", "state"]), inner),
    )
)
def test_anything_is_read(value: Any) -> None:
    for report in unpacked(value):
        assert report.uuid and (report.joules is None or report.joules >= -1)
