"""Writes ``summary.md`` of a report over clocks, and its one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from disagg_report.clocks.choice import Curve, Point, curve, judge
from disagg_report.clocks.folder import ClockReport, ClockSetup
from disagg_report.clocks.runs import Result

SETTING = {"prefill": "PREFILL_SM_CLOCK", "decode": "DECODE_SM_CLOCK"}


def measured(report: ClockReport) -> list[ClockSetup]:
    """Setups that have runs."""
    return [setup for setup in report.setups if setup.results]


def verdict(report: ClockReport) -> str:
    """What to set and what it saves, with its reservations."""
    setups = measured(report)
    pd = next((one for one in setups if one.kind == "pd" and not one.together), None)
    if pd is None:
        return _equal_clocks(setups) if setups else "Nothing was measured."
    found = judge(pd.results, pd.roles)
    if not found.chosen:
        return f"No clock of {pd.title} kept the SLO at {pd.results[0].rate:g} requests/s: set none."
    values = " ".join(f"{SETTING[role]}={mhz}" for role, mhz in found.chosen.items())
    sentences: list[str] = []
    if found.saving is None or found.verified is None or found.default is None:
        sentences.append(f"Each role by itself says {values}; that was not verified together.")
    elif found.kept is False:
        sentences.append(f"Each role by itself says {values}, but together they do not keep the SLO: set higher ones.")
    elif found.saving <= 0:
        sentences.append(f"Set no clocks: {values} would cost {-found.saving:.0%} more energy a request.")
    else:
        sentences.append(
            f"Set {values}: {found.saving:.0%} less energy a request than default clocks "
            f"({found.verified:.0f} instead of {found.default:.0f} requests/Wh), within the SLO."
        )
    missing = [role for role in pd.roles if role not in found.chosen]
    if missing:
        sentences.append(f"No clock of {', '.join(missing)} kept the SLO: leave it at its default.")
    equal = [one for one in setups if one.together]
    sentences += _against_plain(setups, found.verified or found.default)
    return " ".join([*sentences, *([_equal_clocks(equal)] if equal else []), *_doubts(pd)])


def _against_plain(setups: Sequence[ClockSetup], pd: float | None) -> list[str]:
    plain = next((one for one in setups if one.kind == "plain" and not one.together), None)
    if plain is None:
        return ["Plain engines at their own best clock were not measured (`bench --clocks --against-plain`)."]
    found = judge(plain.results, plain.roles)
    best = found.verified if found.kept else None
    figure = max((one for one in (best, found.default) if one), default=None)
    if figure is None or not pd:
        return [f"{plain.title} kept the SLO at no clock."]
    at = f"at {next(iter(found.chosen.values()))} MHz" if figure == best else "at default clocks"
    word = "more" if pd > figure else "fewer"
    return [f"{plain.title} {at} serve {figure:.0f} requests/Wh: P/D serves {abs(pd / figure - 1):.0%} {word}."]


def _equal_clocks(setups: Sequence[ClockSetup]) -> str:
    best: list[tuple[float, str]] = []
    for setup in setups:
        points = [one for one in curve(setup.results, setup.roles[0]).points if one.kept]
        if points:
            top = max(points, key=lambda one: one.requests_per_wh)
            best.append((top.requests_per_wh, f"{setup.title} {top.requests_per_wh:.0f} requests/Wh at {top.mhz} MHz"))
    if not best:
        return "No setup kept the SLO at any clock."
    texts = ", ".join(text for _, text in sorted(best, reverse=True))
    return f"At equal clocks, each at its best one within the SLO: {texts}."


def _doubts(setup: ClockSetup) -> list[str]:
    doubts = []
    hot = sum(one.throttled for one in setup.results)
    if hot:
        doubts.append(f"{hot} of {len(setup.results)} runs were throttled; they count only where there are no others.")
    if any(not energy.counted for one in setup.results for energy in one.energy.values()):
        doubts.append("Energy of some GPUs is an integral of power, which can be off by 5 % and more.")
    edges = [
        role for role in setup.roles
        if (found := curve(setup.results, role)).best and found.best.mhz == found.points[0].mhz
    ]  # fmt: skip
    if edges:
        doubts.append(f"The best clock of {', '.join(edges)} is the lowest one tried.")
    return doubts


def summary(report: ClockReport, plots: Sequence[Path], no_plots: str = "") -> str:
    """The text of the page."""
    header = report.header
    parts = ["# Energy over clocks", header.made]
    if header.simulated:
        parts.append(
            "> **SIMULATED ENGINES on simulated GPUs: energy, clocks and times are those of a model and do not apply to"
            " real ones.**"
        )
    parts += [f"**{verdict(report)}**", f"SLO: {header.slo}."]
    parts.append(
        f"Each request: {header.input_tokens} tokens of prompt, {header.output_tokens} tokens of answer, streamed;"
        f" Poisson arrivals, an open loop, {header.seconds:g} s a run. Each role is swept while the other one has its"
        " default clock; the runs of a round are in an order of their own, and figures are medians over the rounds."
    )
    for setup in measured(report):
        parts.append(_setup(setup))
    parts.append("## Plots")
    parts += [f"![{path.stem}]({path.name})" for path in plots] or [f"None: {no_plots}"]
    parts += ["## Machine, versions, settings", "\n".join(["| | |", "|---|---|", *_facts(header.facts)])]
    return "\n\n".join(parts) + "\n"


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"| {name} | {value.replace('|', '/')} |" for name, value in facts.items()]


def _setup(setup: ClockSetup) -> str:
    blocks = [f"## {setup.title}, {setup.results[0].rate:g} requests/s"]
    found = judge(setup.results, setup.roles)
    roles = setup.roles[:1] if setup.together else setup.roles
    blocks += [_table(curve(setup.results, role), setup.together) for role in roles]
    if found.verified is not None and found.default is not None:
        clocks = ", ".join(f"{role} {mhz} MHz" for role, mhz in found.chosen.items())
        kept = "kept" if found.kept else "**broken**"
        blocks.append(
            f"Verified together: {clocks}: {found.verified:.0f} requests/Wh, SLO {kept}; default clocks:"
            f" {found.default:.0f} requests/Wh."
        )
    return "\n\n".join([*blocks, "\n".join(_runs(setup.results))])


def _table(one: Curve, together: bool) -> str:
    unit = "prompt token" if one.role == "prefill" and not together else "output token"
    lines = [
        f"| {'all GPUs' if together else one.role} MHz | mJ per {unit}, median (range) | requests/Wh | TTFT p99 ms | "
        "TPOT p99 ms | within SLO | SLO | rounds |",
        "|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for point in (*one.points, *filter(None, [one.default])):
        best = one.best is not None and point.mhz == one.best.mhz
        name = "default" if point.mhz is None else f"**{point.mhz}**" if best else str(point.mhz)
        lines.append(f"| {name} | {_row(point)} |")
    return "\n".join(lines)


def _row(point: Point) -> str:
    spread = f"{1e3 * point.joules_per_token:.1f} ({1e3 * point.lowest:.1f}–{1e3 * point.highest:.1f})"
    ttft, tpot = ("–" if value is None else f"{value:.1f}" for value in (point.ttft_ms, point.tpot_ms))
    kept = ("kept" if point.kept else "**broken**") + (", throttled" if point.throttled else "")
    return f"{spread} | {point.requests_per_wh:.0f} | {ttft} | {tpot} | {point.share:.0%} | {kept} | {point.rounds}"


def _runs(results: Sequence[Result]) -> list[str]:
    heat = [e.hottest_c for one in results for e in one.energy.values() if e.hottest_c is not None]
    lines = [f"- {len(results)} runs; energy and requests of each in `setups/*/run-*.json`."]
    if heat:
        lines.append(f"- Hottest GPU of a run: {min(heat):.0f} to {max(heat):.0f} °C, median {median(heat):.0f} °C.")
    for one in results:
        if one.throttled:
            reasons = sorted({reason for energy in one.energy.values() for reason in energy.throttled})
            lines.append(f"- **Throttled** ({', '.join(reasons)}): {one.run}.")
    return lines
