"""The results as a picture: the CPU of each proxy per workload, this proxy's being 1.

python -m bench.proxy.plot RESULTS.json... --out docs/img/performance.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.proxy.peers import DIRECT, OURS
from bench.proxy.report import load
from bench.proxy.summary import names, ratio
from bench.proxy.workloads import WORKLOADS

_COLOURS = ("#2f6f4f", "#7fae93", "#b5541c", "#c9932b", "#8a8f98", "#5b6c9f")


def bars(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each proxy and workload, how many times this proxy's CPU it needs."""
    runs = results["runs"]
    loads = [w for w in WORKLOADS if w in names(runs, "workload") and not WORKLOADS[w].memory]
    found: dict[str, dict[str, float]] = {}
    for peer in names(runs, "peer"):
        if peer == DIRECT:
            continue
        ratios = {w: ratio(runs, w, "cpu_us", OURS, ours=peer) for w in loads}
        found[peer] = {w: known.median for w, known in ratios.items() if known}
    return found


def draw(results: dict[str, Any], out: Path) -> None:
    """Grouped bars, as an SVG that is the same for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "font.size": 9, "font.family": "sans-serif"})
    from matplotlib import pyplot

    found = bars(results)
    loads = list(dict.fromkeys(w for heights in found.values() for w in heights))
    figure, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(found)
    for at, (peer, heights) in enumerate(found.items()):
        places = [index + (at - (len(found) - 1) / 2) * width for index, w in enumerate(loads) if w in heights]
        values = [heights[w] for w in loads if w in heights]
        drawn = axes.bar(
            places, values, width * 0.92, label=results["titles"][peer], color=_COLOURS[at % len(_COLOURS)]
        )
        axes.bar_label(drawn, fmt="%.2f", fontsize=6.5, padding=1)
    axes.axhline(1, color="#2f6f4f", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(loads)), loads)
    axes.set_ylabel("CPU per unit, this proxy = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(found), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Exit code 2 without matplotlib."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.plot", description="results as a picture")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="SVG file")
    options = parser.parse_args()
    try:
        draw(load(options.results), options.out)
    except ModuleNotFoundError as missing:
        print(f"no picture: {missing}; pip install -r bench/requirements.txt", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
