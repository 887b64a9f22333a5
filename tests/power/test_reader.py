"""The proxy's own reader: it delivers by engine, and says why it cannot read."""

from __future__ import annotations

import logging
import queue
from pathlib import Path

import pytest

from disagg_power.devices import NoLibrary
from disagg_power.rapl import packages
from disagg_power.reader import Reader, Reports
from disagg_power.simulated import GpuModel, SimulatedGpus


def test_reports_come_by_engine() -> None:
    got: queue.Queue[Reports] = queue.Queue()
    gpus = SimulatedGpus(models=[GpuModel()] * 3)
    reader = Reader({"a:1": ["0", "2"], "b:1": ["1"]}, lambda: gpus, got.put)
    reader.start()
    reports = got.get(timeout=30)
    reader.stop()
    assert {key: [one.index for one in group] for key, group in reports.items()} == {"a:1": [0, 2], "b:1": [1]}
    assert all(one.state == "ok" for group in reports.values() for one in group)


@pytest.mark.parametrize("word", ["7", "none"])
def test_what_cannot_be_read_is_said_once(word: str, caplog: pytest.LogCaptureFixture) -> None:
    def devices() -> SimulatedGpus:
        if word == "none":
            raise NoLibrary("no driver")
        return SimulatedGpus(models=[GpuModel()])

    caplog.set_level(logging.INFO)
    reader = Reader({"a:1": [word]}, devices, lambda reports: pytest.fail("nothing is delivered"))
    reader.start()
    reader._thread.join(30)
    assert [record.getMessage() for record in caplog.records] == [
        "Energy is not measured (POWER_GPUS): "
        + ("no driver" if word == "none" else "no GPU is named '7' (GPUs here: 0)")
    ]


def test_packages_add_up_a_counter_that_wraps(tmp_path: Path) -> None:
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "1000000000"), ("energy_uj", "999000000")):
        (folder / name).write_text(text)
    (tmp_path / "intel-rapl:0:0").mkdir()
    (found,) = packages(tmp_path)
    (folder / "energy_uj").write_text("2000000")
    report = found.sample()
    assert report.joules == pytest.approx(3.0) and report.uuid == "cpu-package-0"
    (folder / "energy_uj").unlink()
    assert found.sample().state == "no_figures" and packages(tmp_path / "none") == []
