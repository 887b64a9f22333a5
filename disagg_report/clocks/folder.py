"""Files of a report over clocks: ``report.json``, and for each setup ``setup.json`` and its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disagg_report.clocks.runs import FORMAT, Result, result_of
from disagg_report.records import BadRecord
from disagg_report.slo import Slo

QUESTION = "clocks"


@dataclass(frozen=True, slots=True)
class ClockHeader:
    """What all setups of a report have in common; ``question`` tells it from other reports."""

    made: str
    slo: Slo
    input_tokens: int
    output_tokens: int
    seconds: float
    seed: int
    simulated: bool
    facts: dict[str, str] = field(default_factory=dict)
    question: str = QUESTION


@dataclass(frozen=True, slots=True)
class ClockSetup:
    """One setup: prefill and decode engines, or plain ones (``kind`` ``pd`` or ``plain``).

    Attributes:
        roles: the roles whose clocks were swept.
        together: whether all roles had the same clock in a run.
        results: its runs in their order.
    """

    name: str
    title: str
    kind: str
    roles: tuple[str, ...]
    together: bool = False
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, slots=True)
class ClockReport:
    """All measurements of a report."""

    header: ClockHeader
    setups: Sequence[ClockSetup]


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: {error}") from None
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise BadRecord(f"{path}: the format is not {FORMAT}")
    return value


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, **value}, indent=1), encoding="utf-8")


def is_about_clocks(folder: Path) -> bool:
    """Whether the report in this folder is one over clocks."""
    try:
        return _load(folder / "report.json").get("question") == QUESTION
    except BadRecord:
        return False


def write_header(folder: Path, header: ClockHeader) -> None:
    """Write report.json."""
    _dump(folder / "report.json", asdict(header))


def write_setup(folder: Path, setup: ClockSetup) -> None:
    """``folder``: of the setup. The runs are written by the sweep."""
    value = asdict(setup)
    del value["results"]
    _dump(folder / "setup.json", value)


def read_header(folder: Path) -> ClockHeader:
    """Read report.json. Raises BadRecord."""
    value = _load(folder / "report.json")
    try:
        return ClockHeader(**{**value, "slo": Slo(**value["slo"])})
    except (KeyError, TypeError) as error:
        raise BadRecord(f"{folder}/report.json: not a report over clocks ({error})") from None


def read_report(folder: Path) -> ClockReport:
    """Read everything. Raises BadRecord."""
    setups = []
    for path in sorted((folder / "setups").glob("[0-9][0-9]-*")):
        value = _load(path / "setup.json")
        results = tuple(result_of(_load(file), str(file)) for file in sorted(path.glob("run-*.json")))
        try:
            setups.append(ClockSetup(**{**value, "roles": tuple(value["roles"]), "results": results}))
        except (KeyError, TypeError) as error:
            raise BadRecord(f"{path}/setup.json: not a setup ({error})") from None
    return ClockReport(read_header(folder), setups)
