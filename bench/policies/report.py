"""What the trials gave: rows, tables, and two plots."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

Row = dict[str, Any]
"""One workload at one load under one pair of policies; figures are medians over the seeds."""

_COLOURS = ("#8c8c8c", "#4c78a8", "#72b7b2", "#b279a2", "#e45756", "#f2b134")
_COLUMNS = (
    ("TTFT p50 ms", "ttft_p50_ms", ".0f"), ("p99 ms", "ttft_p99_ms", ".0f"), ("ITL p99 ms", "itl_p99_ms", ".1f"),
    ("hit rate", "hit_rate", ".2f"), ("P max/mean", "prefill_balance", ".2f"), ("D max/mean", "decode_balance", ".2f"),
)  # fmt: skip


def joined(trials: Sequence[Row]) -> list[Row]:
    """One row for each setup, of the trials that differ in their seed only."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for trial in trials:
        groups.setdefault((trial["workload"], trial["load"], trial["rate"], trial["policy"]), []).append(trial)
    rows = []
    for (workload, load, rate, policy), same in groups.items():
        figures = {name: round(median(t["figures"][name] for t in same), 4) for name in same[0]["figures"]}
        rows.append({"workload": workload, "load": load, "rate": rate, "policy": policy, **figures})
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table, the best TTFTs of each workload and load in bold."""
    lines = ["| workload, load | prefill / decode | " + " | ".join(title for title, _, _ in _COLUMNS) + " |"]
    lines.append("|---" * (2 + len(_COLUMNS)) + "|")
    for workload, load in dict.fromkeys((row["workload"], row["load"]) for row in rows):
        same = [row for row in rows if (row["workload"], row["load"]) == (workload, load)]
        head = f"{workload}, {load} ({same[0]['rate'] / 1000:.0f}k tokens/s)"
        for row in same:
            cells = []
            for _, name, form in _COLUMNS:
                text = format(row[name], form)
                best = name.startswith("ttft") and row[name] == min(other[name] for other in same)
                cells.append(f"**{text}**" if best else text)
            lines.append(f"| {head} | {row['policy']} | " + " | ".join(cells) + " |")
            head = ""
    return "\n".join(lines)


def geometric(rows: Sequence[Row], name: str) -> dict[str, float]:
    """For each policy the geometric mean over workloads and loads of a figure's ratio to round robin's."""
    base = {(r["workload"], r["load"]): r[name] for r in rows if r["policy"].startswith("round_robin/")}
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["policy"], []).append(row[name] / base[row["workload"], row["load"]])
    return {policy: _product(ratios) ** (1 / len(ratios)) for policy, ratios in found.items()}


def _product(values: Sequence[float]) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result


def bars(rows: Sequence[Row], name: str, title: str, *, relative: bool) -> str:
    """An SVG: a group of bars for each workload and load; ``relative`` to round robin, cut off at 1.5."""
    groups = list(dict.fromkeys((row["workload"], row["load"]) for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    width, height, left, top = 8 * len(policies) + 14, 150, 44, 48
    total = left + width * len(groups) + 10
    ceiling = 1.5 if relative else 1.0
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{top + height + 44}" font-family="sans-serif"'
        ' font-size="10">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="14" font-size="12">{escape(title)}</text>',
    ]
    for at, policy in enumerate(policies):
        x = left + at % 6 * 118
        out.append(f'<rect x="{x}" y="22" width="9" height="9" fill="{_COLOURS[at % 6]}"/>')
        out.append(f'<text x="{x + 12}" y="31" font-size="9">{escape(policy)}</text>')
    for step in range(4):
        value = ceiling * step / 3
        y = top + height - height * step / 3
        out.append(f'<path d="M{left} {y:.0f}H{total - 10}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 4}" y="{y + 3:.0f}" text-anchor="end">{value:.2f}</text>')
    for at, (workload, load) in enumerate(groups):
        same = {row["policy"]: row[name] for row in rows if (row["workload"], row["load"]) == (workload, load)}
        base = next(iter(same.values())) if relative else 1.0
        x = left + at * width + 7
        for index, policy in enumerate(policies):
            value = same[policy] / base if base else 0.0
            tall = height * min(value, ceiling) / ceiling
            out.append(
                f'<rect x="{x + 8 * index}" y="{top + height - tall:.1f}" width="7" height="{tall:.1f}"'
                f' fill="{_COLOURS[index % 6]}"/>'
            )
        middle = x + 4 * len(policies)
        out.append(f'<text x="{middle}" y="{top + height + 14}" text-anchor="middle">{escape(workload)}</text>')
        out.append(f'<text x="{middle}" y="{top + height + 27}" text-anchor="middle">{escape(load)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
