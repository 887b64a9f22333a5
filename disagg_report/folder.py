"""Files of a report's folder: reading and writing.

report.json                     the SLO, the workload, the machine
setups/NN-NAME/setup.json       a setup, and why its sweep ended
setups/NN-NAME/rate-RATE.json   every request of one rate
summary.md, *.svg               generated from those
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disagg_report.records import FORMAT, BadRecord, Measurement
from disagg_report.slo import Slo


@dataclass(frozen=True, slots=True)
class Header:
    """What all setups of a report have in common.

    Attributes:
        made: time of creation, ISO 8601.
        question: ``sweep``, or ``ratio`` where splits are compared.
        simulated: the engines are simulated, so the figures do not apply to GPUs.
        facts: machine, versions and settings, by name.
    """

    made: str
    question: str
    slo: Slo
    input_tokens: int
    output_tokens: int
    seconds: float
    seed: int
    simulated: bool
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to use the GPUs.

    Attributes:
        kind: ``pd`` (prefill and decode behind the proxy), ``elastic`` (the same, and the proxy chooses for each
            request where it is prefilled) or ``plain`` (engines that do both).
        client: the load generator.
        ended: why its sweep ended; empty while it runs.
        no_power: why power was not measured; empty if it was.
        notes: remarks for readers of the report.
    """

    name: str
    title: str
    kind: str
    client: str
    urls: tuple[str, ...]
    engines: int
    ended: str = ""
    no_power: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetupResult:
    """A setup with its rates, lowest first."""

    setup: Setup
    rates: tuple[Measurement, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Report:
    """Content of a folder."""

    header: Header
    setups: tuple[SetupResult, ...]


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=None if "shots" in value else 2) + "\n", encoding="utf-8")
    new.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise BadRecord(f"{path}: not a JSON object")
    return value


def write_header(folder: Path, header: Header) -> None:
    """Write report.json."""
    _write(folder / "report.json", {"format": FORMAT, **asdict(header)})


def read_header(folder: Path) -> Header:
    """Read report.json. Raises BadRecord."""
    path = folder / "report.json"
    value = _read(path)
    try:
        if value.pop("format") != FORMAT:
            raise BadRecord(f"{path}: the format is not {FORMAT}")
        value["slo"] = Slo(**value["slo"])
        return Header(**value)
    except (KeyError, TypeError) as error:
        raise BadRecord(f"{path}: not a report ({error})") from None


def setup_folder(folder: Path, name: str) -> Path:
    """Return the folder of a setup, created if necessary; setups are numbered in the order of measurement."""
    for path in sorted((folder / "setups").glob("[0-9][0-9]-*")):
        if path.name[3:] == name:
            return path
    number = len(list((folder / "setups").glob("[0-9][0-9]-*"))) + 1
    path = folder / "setups" / f"{number:02d}-{name}"
    path.mkdir(parents=True)
    return path


def write_setup(folder: Path, setup: Setup) -> None:
    """``folder``: of the setup."""
    _write(folder / "setup.json", asdict(setup))


def write_rate(folder: Path, measured: Measurement) -> None:
    """``folder``: of the setup."""
    _write(folder / f"rate-{measured.rate:08.3f}.json", measured.to_json())


def read_report(folder: Path) -> Report:
    """Read all measurements. Raises BadRecord."""
    header = read_header(folder)
    setups = []
    for path in sorted((folder / "setups").glob("[0-9][0-9]-*")):
        value = _read(path / "setup.json")
        try:
            setup = Setup(**{**value, "urls": tuple(value["urls"]), "notes": tuple(value["notes"])})
        except (KeyError, TypeError) as error:
            raise BadRecord(f"{path}/setup.json: not a setup ({error})") from None
        rates = [Measurement.from_json(_read(file), str(file)) for file in sorted(path.glob("rate-*.json"))]
        setups.append(SetupResult(setup, tuple(sorted(rates, key=lambda one: one.rate))))
    return Report(header, tuple(setups))
