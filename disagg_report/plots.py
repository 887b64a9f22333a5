"""The plots, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disagg_report.figures import Figures
from disagg_report.folder import Report
from disagg_report.verdict import Outcome, outcomes

NO_MATPLOTLIB = "matplotlib is not installed"

# Okabe and Ito's palette for colour-blind readers; markers differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


class NoPlots(Exception):
    """matplotlib is not installed, or there is nothing to draw; the text is the reason."""


def draw(report: Report, folder: Path) -> list[Path]:
    """Write the SVG files; equal figures give equal files. Raises NoPlots."""
    every = [one for one in outcomes(report) if any(not rate.interrupted for rate in one.rates)]
    if not every:
        raise NoPlots("no rate was measured completely")
    try:
        prepare()
    except ImportError:
        raise NoPlots(NO_MATPLOTLIB) from None
    slo = report.header.slo
    simulated = ", SIMULATED engines" if report.header.simulated else ""
    title = f"{report.header.input_tokens} tokens in, {report.header.output_tokens} out{simulated}"
    paths = [
        _lines(every, folder / "ttft.svg", title, "time to first token, ms", lambda one: one.ttft_ms,
               slo.ttft_ms, "TTFT"),
        _lines(every, folder / "inter_token_latency.svg", title, "inter-token latency, ms", lambda one: one.itl_ms,
               slo.tpot_ms, "TPOT"),
        _goodput(every, folder / "goodput.svg", title),
    ]  # fmt: skip
    if len(every) > 1:
        paths.append(_bars(every, folder / "capacity.svg", title))
    return paths


def prepare() -> None:
    """Settings under which equal figures give equal files. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "disagg_report", "svg.fonttype": "none", "font.size": 9})


def _complete_rates(one: Outcome) -> list[Figures]:
    return [rate for rate in one.rates if not rate.interrupted]


def new_axes(title: str) -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _rate_axis(axes: Any, every: Sequence[Outcome]) -> None:
    from matplotlib.ticker import NullLocator

    rates = sorted({rate.rate for one in every for rate in _complete_rates(one)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 10 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("requests per second, Poisson arrivals")


def _plain_numbers(axis: Any) -> None:
    """Label 20, 100, 1000 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter("")


def save(figure: Any, path: Path) -> Path:
    """Write a figure."""
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _lines(every: Sequence[Outcome], path: Path, title: str, label: str,
           of: Callable[[Figures], tuple[float | None, float | None]], limit: float,
           limit_name: str) -> Path:  # fmt: skip
    figure, axes = new_axes(title)
    for at, one in enumerate(every):
        colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
        for place, style, name in ((0, "-", "p50"), (1, "--", "p99")):
            points = [(rate.rate, value) for rate in _complete_rates(one) if (value := of(rate)[place]) is not None]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], style, color=colour, marker=marker, markersize=4,
                linewidth=1.3, label=f"{one.setup.title}, {name}",
            )  # fmt: skip
    axes.axhline(limit, color="#555555", linewidth=1, linestyle=":", label=f"SLO: {limit_name} {limit:g} ms")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel(label)
    _rate_axis(axes, every)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def _goodput(every: Sequence[Outcome], path: Path, title: str) -> Path:
    figure, axes = new_axes(title)
    rates = sorted({rate.rate for one in every for rate in _complete_rates(one)})
    axes.plot(rates, rates, color="#999999", linewidth=1, linestyle=":", label="all requests within the SLO")
    for at, one in enumerate(every):
        points = _complete_rates(one)
        axes.plot(
            [rate.rate for rate in points], [rate.goodput for rate in points], color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)], markersize=4, linewidth=1.3, label=one.setup.title,
        )  # fmt: skip
    axes.set_yscale("symlog", base=2, linthresh=max(0.25, rates[0] / 4))
    axes.set_yticks([0, *rates], ["0", *(f"{rate:g}" for rate in rates)])
    axes.set_ylabel("requests per second within the SLO")
    _rate_axis(axes, every)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def _bars(every: Sequence[Outcome], path: Path, title: str) -> Path:
    figure, axes = new_axes(title)
    drawn = axes.bar(
        [one.setup.title for one in every], [one.capacity for one in every], width=0.6,
        color=[COLOURS[at % len(COLOURS)] for at in range(len(every))],
    )  # fmt: skip
    marks = [f"{one.capacity:.2f}" + ("" if one.reached else " or more") for one in every]
    axes.bar_label(drawn, labels=marks, fontsize=8, padding=2)
    axes.set_ylabel("requests per second within the SLO")
    return save(figure, path)
