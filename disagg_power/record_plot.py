"""The plot of a recording: power and SM clock of each role over time, its phases shaded."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from disagg_power.recorder import requests_file

NO_MATPLOTLIB = "matplotlib is not installed (pip install matplotlib)"
_COLOURS = {"prefill": "#0072b2", "decode": "#d55e00", "": "#009e73"}
"""Okabe and Ito's palette for colour-blind readers."""


class NoPlot(Exception):
    """There is nothing to draw, or nothing to draw it with; the text is the reason."""


def draw(samples: Path, out: Path, title: str = "") -> None:
    """Write an SVG (or what the suffix of ``out`` says). Equal recordings give equal files.

    Raises:
        NoPlot: no matplotlib, or no samples.
        OSError: a file cannot be read or written.
    """
    roles = read_samples(samples)
    if not roles:
        raise NoPlot("the recording has no sample with power")
    phases = read_phases(requests_file(samples))
    try:
        import matplotlib
    except ImportError:
        raise NoPlot(NO_MATPLOTLIB) from None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "disagg_power", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(roles), 1, figsize=(8, 1 + 2.2 * len(roles)), sharex=True, squeeze=False, layout="constrained"
    )
    for (role, gpus), (axes,) in zip(sorted(roles.items(), reverse=True), rows, strict=True):
        colour = _COLOURS.get(role, _COLOURS[""])
        for begin, end in merged(phases.get(role, ())):
            axes.axvspan(begin, end, color=colour, alpha=0.12, linewidth=0)
        clocks = axes.twinx()
        for times, watts, clock in gpus:
            axes.plot(times, watts, color=colour, linewidth=1.2)
            clocks.plot(times, clock, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"{role or 'GPU'}, W")
        clocks.set_ylabel("SM clock, MHz (dotted)")
        axes.set_ylim(bottom=0)
        clocks.set_ylim(bottom=0)
        axes.spines["top"].set_visible(False)
        clocks.spines["top"].set_visible(False)
    rows[0][0].set_title(title or "Power and SM clock; shaded while requests are in the phase", fontsize=9)
    rows[-1][0].set_xlabel("s")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


Series = tuple[list[float], list[float], list[float]]
"""Seconds, watts, SM clock in MHz of one GPU."""


def read_samples(path: Path) -> dict[str, list[Series]]:
    """The samples with power, by role."""
    found: defaultdict[str, defaultdict[str, Series]] = defaultdict(lambda: defaultdict(lambda: ([], [], [])))
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["power_w"]:
                times, watts, clocks = found[row["role"]][row["uuid"]]
                times.append(float(row["elapsed_s"]))
                watts.append(float(row["power_w"]))
                clocks.append(float(row["sm_clock_mhz"] or "nan"))
    return {role: list(gpus.values()) for role, gpus in found.items()}


def read_phases(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Begin and end of the phases of all requests, by role; none where there is no such file."""
    found: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for role, spans in found.items():
                    if row[f"{role}_start_s"] and row[f"{role}_end_s"]:
                        spans.append((float(row[f"{role}_start_s"]), float(row[f"{role}_end_s"])))
    return found


def merged(spans: Iterable[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The union of the intervals, so that overlapping requests are not shaded twice."""
    found: list[Any] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([begin, end])
    return [(begin, end) for begin, end in found]
