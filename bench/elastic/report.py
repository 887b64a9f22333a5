"""Tables and plots of what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from disagg_report.plots import COLOURS, MARKERS, new_axes, prepare, save

Result = dict[str, Any]


def groups(results: Sequence[Result]) -> Iterator[tuple[tuple[str, int, str], list[Result]]]:
    """Results of the same workload, number of GPUs and paces."""
    found: dict[tuple[str, int, str], list[Result]] = {}
    for one in results:
        found.setdefault((one["workload"], one["gpus"], one["paces"]), []).append(one)
    yield from found.items()


def knees(results: Sequence[Result]) -> str:
    """Markdown: the knee of every arm, the highest one of each row in bold."""
    lines = [
        "| workload | GPUs | plain | best split | elastic | elastic / best | upper bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for (workload, gpus, paces), same in groups(results):
        by_arm = {one["arm"]: one["knee"] for one in same}
        splits = {name: knee for name, knee in by_arm.items() if name not in ("plain", "elastic")}
        split = max(splits, key=lambda name: splits[name], default="")
        plain, elastic, best_split = by_arm.get("plain", 0.0), by_arm.get("elastic"), splits.get(split, 0.0)
        best = max(plain, best_split)
        cells = [_bold(plain, best), f"{_bold(best_split, best)} ({split})" if split else "-"]
        cells += ["-", "-"] if elastic is None else [_bold(elastic, best), f"{elastic / best:.2f}" if best else "-"]
        name = workload if paces == "equal" else f"{workload}, paces {paces}"
        lines.append(f"| {name} | {gpus} | " + " | ".join(cells) + f" | {same[0]['bound']:.1f} |")
    return "\n".join(lines)


def _bold(value: float, best: float) -> str:
    return f"**{value:.1f}**" if value and value >= best else f"{value:.1f}"


def latencies(results: Sequence[Result]) -> str:
    """Markdown: TTFT and TPOT at the lowest rate and near the knee of the best arm."""
    lines = [
        "| workload | GPUs | arm | rate | TTFT p50 ms | TPOT p50 ms | longest gap p99 ms | good |"
        " split / prefill / decode alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (workload, gpus, paces), same in groups(results):
        if paces != "equal":
            continue
        for one in same:
            point = one["points"][0]
            ways = " / ".join(f"{point[f'share_{way}']:.2f}" for way in ("split", "prefill", "decode"))
            lines.append(
                f"| {workload} | {gpus} | {one['arm']} | {point['rate']:.1f} | {point['ttft_p50_ms']:.0f} |"
                f" {point['tpot_p50_ms']:.1f} | {point['longest_gap_p99_ms']:.0f} | {point['good']:.2f} | {ways} |"
            )
    return "\n".join(lines)


def overloads(results: Sequence[Result]) -> str:
    """Markdown: what is left at 1.5 times the knee."""
    lines = [
        "| workload | GPUs | arm | knee | goodput at 1.5 x knee / at the knee | prompts computed twice | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['workload']} | {one['gpus']} | {one['arm']} | {one['knee']:.1f} | {one['overload']['goodput']:.2f} |"
        f" {one['overload']['twice']:.1%} | {one['overload']['refused']:.1%} |"
        for one in results
        if "overload" in one
    ]
    return "\n".join(lines)


def plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """An SVG of goodput against rate for each workload and number of GPUs. Raises ImportError without matplotlib."""
    prepare()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (workload, gpus, paces), same in groups(results):
        name = f"{workload.replace('/', '-')}-{gpus}" + ("" if paces == "equal" else f"-{paces}")
        figure, axes = new_axes(f"{workload}, {gpus} GPUs" + ("" if paces == "equal" else f", paces {paces}"))
        for at, one in enumerate(same):
            points = one["points"]
            axes.plot(
                [point["rate"] for point in points], [point["goodput"] for point in points], label=one["arm"],
                color=COLOURS[at % len(COLOURS)], marker=MARKERS[at % len(MARKERS)], markersize=3, linewidth=1.2,
            )  # fmt: skip
        bound = same[0]["bound"]
        axes.axhline(bound, color="#555555", linewidth=1, linestyle=":", label="upper bound")
        axes.plot([0, bound], [0, bound], color="#bbbbbb", linewidth=0.8)
        axes.set_xlabel("requests per second")
        axes.set_ylabel("requests per second within the SLO")
        axes.legend(frameon=False, fontsize=8)
        paths.append(save(figure, folder / f"{name}.svg"))
    return paths
