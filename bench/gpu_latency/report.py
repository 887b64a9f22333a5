"""The result as JSON and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_latency.figures import figures
from bench.gpu_latency.record import Measured

_ROWS = (
    ("TTFT p50, ms", "ttft_ms", "p50", 1), ("TTFT p99, ms", "ttft_ms", "p99", 1),
    ("inter-token p50, ms", "itl_ms", "p50", 2), ("inter-token p99, ms", "itl_ms", "p99", 2),
)  # fmt: skip

_FEW = 100
"""Requests below which the 99th percentile of one figure per request is the largest, and has no interval."""


def write(folder: Path, about: dict[str, Any], phases: Sequence[Measured]) -> dict[str, Any]:
    """``result.json`` and ``table.md`` in ``folder``; returns the former."""
    result = {**about, "phases": {}}
    for phase in phases:
        result["phases"][phase.name] = {**figures(phase.shots, phase.blocks), **phase.beside}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(result), encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: one part per phase, then what was left out."""
    lines = [f"### {result.get('connector', '')}, {result.get('engines', '')}", ""]
    for name, phase in result["phases"].items():
        count = phase["requests"]
        lines += [
            f"**{name} tokens** ({phase.get('load', '')}; counted: {count['direct']} requests direct, "
            f"{count['proxy']} through the proxy; failed: {phase['errors']['direct']}, {phase['errors']['proxy']}"
            f"{'; incomplete' if 'incomplete' in phase else ''})", "",
            "| | direct | proxy | difference | 95 % interval |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for label, kind, share, digits in _ROWS:
            row = phase[kind].get(share)
            if row is not None:
                few = kind == "ttft_ms" and share == "p99" and min(count.values()) < _FEW
                low, high = row["interval"]
                cells = [f"{label}{' (the largest)' if few else ''}", f"{row['direct']:.{digits}f}"]
                cells += [f"{row['proxy']:.{digits}f}", f"{row['difference']:+.{digits}f}"]
                cells.append("" if few else f"{low:+.{digits}f} to {high:+.{digits}f}")
                lines.append(f"| {' | '.join(cells)} |")
        for label, key in (("TTFT", "paired_ttft_ms"), ("mean inter-token", "paired_mean_itl_ms")):
            if phase.get(key):
                low, high = phase[key]["interval"]
                lines.append(f"| {label}, median within pairs, ms | | | {phase[key]['median']:+.3f} "
                             f"| {low:+.3f} to {high:+.3f} |")  # fmt: skip
        rates = phase.get("tokens_per_s", {})
        if len(rates) == 2:
            lines.append(f"| tokens/s | {rates['direct']:.0f} | {rates['proxy']:.0f} "
                         f"| {rates['proxy'] - rates['direct']:+.0f} | |")  # fmt: skip
        lines.append("")
    for skipped in result.get("skipped", []):
        lines.append(f"Left out: {skipped}")
    if result.get("error"):
        lines.append(f"Ended early: {result['error'].splitlines()[0]}")
    if result.get("serve"):
        lines += ["", "`vllm bench serve` through the proxy: " + ", ".join(
            f"{key} {value}" for key, value in result["serve"].items())]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
