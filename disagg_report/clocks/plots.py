"""The plots of a report over clocks: energy over the clock of each role, and energy against TTFT and TPOT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_report.clocks.choice import Point, curve
from disagg_report.clocks.folder import ClockReport, ClockSetup
from disagg_report.clocks.summary import measured
from disagg_report.plots import COLOURS, MARKERS, NO_MATPLOTLIB, NoPlots, new_axes, prepare, save


def draw(report: ClockReport, folder: Path) -> list[Path]:
    """Write the SVG files; equal figures give equal files. Raises NoPlots."""
    setups = measured(report)
    if not setups:
        raise NoPlots("no run was complete")
    try:
        prepare()
    except ImportError:
        raise NoPlots(NO_MATPLOTLIB) from None
    header = report.header
    simulated = ", SIMULATED engines and GPUs" if header.simulated else ""
    title = f"{header.input_tokens} tokens in, {header.output_tokens} out{simulated}"
    paths = []
    for role in sorted({role for setup in setups for role in shown_roles(setup)}, reverse=True):
        mine = [setup for setup in setups if role in shown_roles(setup)]
        paths.append(_energy(mine, role, folder / f"energy_{role}.svg", title))
        wanted = (("ttft", header.slo.ttft_ms), ("tpot", header.slo.tpot_ms))
        for name, limit in wanted if role == "plain" else wanted[:1] if role == "prefill" else wanted[1:]:
            paths.append(_pareto(mine, role, name, limit, folder / f"pareto_{role}_{name}.svg", title))
    return paths


def shown_roles(setup: ClockSetup) -> Sequence[str]:
    """The roles that have a curve of their own."""
    return setup.roles[:1] if setup.together else setup.roles


def _unit(role: str) -> str:
    return "mJ per prompt token" if role == "prefill" else "mJ per output token"


def _energy(setups: Sequence[ClockSetup], role: str, path: Path, title: str) -> Path:
    figure, axes = new_axes(f"Energy over clock, {role}: {title}")
    for at, setup in enumerate(setups):
        found = curve(setup.results, role)
        colour = COLOURS[at % len(COLOURS)]
        x = [point.mhz for point in found.points]
        y = [1e3 * point.joules_per_token for point in found.points]
        low = [1e3 * (point.joules_per_token - point.lowest) for point in found.points]
        high = [1e3 * (point.highest - point.joules_per_token) for point in found.points]
        axes.errorbar(x, y, (low, high), color=colour, marker=MARKERS[at % len(MARKERS)], markersize=4, linewidth=1.3,
                      capsize=2, label=setup.title)  # fmt: skip
        broken = [point for point in found.points if not point.kept]
        axes.plot([point.mhz for point in broken], [1e3 * point.joules_per_token for point in broken], "x",
                  color="#555555", markersize=9, label="SLO broken" if at == 0 and broken else None)  # fmt: skip
        if found.best is not None:
            axes.plot([found.best.mhz], [1e3 * found.best.joules_per_token], "o", markersize=11, fillstyle="none",
                      color=colour, label=f"best: {found.best.mhz} MHz")  # fmt: skip
        if found.default is not None:
            axes.axhline(1e3 * found.default.joules_per_token, color=colour, linewidth=1, linestyle=":",
                         label=f"default clocks, {setup.title}")  # fmt: skip
    axes.set_xlabel("cap of the SM clock, MHz")
    axes.set_ylabel(_unit(role))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def _pareto(setups: Sequence[ClockSetup], role: str, name: str, limit: float, path: Path, title: str) -> Path:
    figure, axes = new_axes(f"Energy against {name.upper()}, {role}: {title}")
    for at, setup in enumerate(setups):
        points = [one for one in curve(setup.results, role).points if value(one, name) is not None]
        axes.plot([value(one, name) for one in points], [1e3 * one.joules_per_token for one in points],
                  color=COLOURS[at % len(COLOURS)], marker=MARKERS[at % len(MARKERS)], markersize=4, linewidth=1,
                  label=setup.title)  # fmt: skip
        for one in points:
            axes.annotate(f"{one.mhz}", (value(one, name), 1e3 * one.joules_per_token), fontsize=7)
    axes.axvline(limit, color="#555555", linewidth=1, linestyle=":", label=f"SLO: {limit:g} ms")
    axes.set_xlabel(f"{name.upper()} p99, ms")
    axes.set_ylabel(_unit(role))
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def value(point: Point, name: str) -> Any:
    """The p99 of TTFT or TPOT."""
    return point.ttft_ms if name == "ttft" else point.tpot_ms
