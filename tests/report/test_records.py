"""What is on disk is read as it was written, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_report.folder import read_report, setup_folder
from disagg_report.records import BadRecord, Measurement, Shot
from tests.report.make import POWER, measured, shot, written


def test_a_measurement_comes_back_as_it_was() -> None:
    one = Measurement(2.5, 7.0, (shot(), Shot(error="HTTP 500", sent=1.0)), POWER, client_cpu=0.2, interrupted=True)
    assert Measurement.from_json(json.loads(json.dumps(one.to_json())), "here") == one


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 99},
        {"shots": [{"sent": 1}]},
        {"shots": 3},
        {"rate": "fast"},
        {"power": {"prefill": {}}},
    ],
)
def test_another_file_is_refused_by_name(damage: dict[str, object]) -> None:
    with pytest.raises(BadRecord, match=r"rate-1\.json"):
        Measurement.from_json({**measured(1, 2).to_json(), **damage}, "rate-1.json")


def test_a_report_comes_back_in_its_order(tmp_path: Path) -> None:
    written(tmp_path, {"b": [measured(8, 3), measured(0.5, 2)], "a": [measured(1, 2)]})
    report = read_report(tmp_path)
    assert [one.setup.title for one in report.setups] == ["b", "a"]
    assert [one.rate for one in report.setups[0].rates] == [0.5, 8]
    assert setup_folder(tmp_path, "s1").name == "02-s1"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "slo": {}}', '{"format": 2}'])
def test_a_folder_without_a_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(BadRecord, match=r"report\.json"):
        read_report(tmp_path)
    with pytest.raises(BadRecord):
        read_report(tmp_path / "missing")


def test_a_setup_that_is_damaged_is_named(tmp_path: Path) -> None:
    written(tmp_path, {"a": [measured(1, 2)]})
    (tmp_path / "setups/01-s0/setup.json").write_text('{"urls": [], "notes": []}')
    with pytest.raises(BadRecord, match=r"01-s0/setup\.json"):
        read_report(tmp_path)
