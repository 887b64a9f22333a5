"""Figures of windows, and the table. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disagg_report.figures import percentile
from disagg_report.records import Shot
from disagg_report.slo import Slo

Line = Mapping[str, Any]


def figures(shots: Sequence[Shot], slo: Slo) -> dict[str, Any]:
    """Of the requests of one window, or of one arm and rate in all rounds. Times are in milliseconds.

    ``longest_gap_p99`` is the p99 over requests of the longest time between two of its tokens.
    """
    answered = [shot for shot in shots if shot.answered]

    def quantiles(name: str, values: Sequence[float], *shares: float) -> dict[str, float | None]:
        found = {f"{name}_p{share * 100:g}": percentile(values, share) for share in shares}
        return {key: None if value is None else round(value, 2) for key, value in found.items()}

    return {
        "sent": len(shots),
        "answered": len(answered),
        "good": round(sum(slo.good(shot) for shot in shots) / len(shots), 4) if shots else None,
        **quantiles("ttft", [shot.ttft_ms for shot in answered if shot.ttft_ms is not None], 0.5, 0.99),
        **quantiles("tpot", [shot.tpot_ms for shot in answered if shot.output_tokens > 1], 0.5, 0.99),
        **quantiles("gap", [gap for shot in answered for gap in shot.itl_ms], 0.99),
        **quantiles("longest_gap", [max(shot.itl_ms) for shot in answered if shot.itl_ms], 0.99),
    }


def table(lines: Sequence[Line], requests: Iterable[tuple[Line, Sequence[Shot]]], slo: Slo) -> str:
    """Markdown: first tokens of single requests, then all windows by rate and arm.

    Args:
        lines: of results.jsonl.
        requests: each window of raw.jsonl with its requests.
    """
    about: Line = next((line for line in lines if line["step"] == "about"), {})
    text = [f"{about.get('engines', '')} engines, {about.get('gpus', '')}; {slo}", ""]
    text += [f"**{note}**\n" for note in about.get("notes", ())]
    if single := [line for line in lines if line["step"] == "ttft"]:
        text += ["| TTFT p50 unloaded, ms | " + " | ".join(single[0]["arms"]) + " | requests each |"]
        text += ["|---|" + "---|" * (len(single[0]["arms"]) + 1)]
        for line in single:
            cells = ["–" if value is None else f"{value:.1f}" for value in line["arms"].values()]
            text.append(f"| {line['tokens']:,} tokens | {' | '.join(cells)} | {line['requests']} |")
        text.append("")
    pooled: defaultdict[tuple[float, str], list[Shot]] = defaultdict(list)
    for window, shots in requests:
        pooled[window["rate"], window["arm"]] += shots
    text += [
        "| requests/s | arm | good | TTFT p50 / p99, ms | TPOT p50 / p99, ms | longest gap p99, ms | failed | computed "
        "again | placed | J per request (idle taken off) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (rate, arm), shots in sorted(pooled.items(), key=lambda item: item[0][0]):
        mine = [line for line in lines if (line["step"], line.get("rate"), line.get("arm")) == ("window", rate, arm)]
        found = figures(shots, slo)
        text.append("| " + " | ".join([
            f"{rate:g}", arm, _number(found["good"], 3), _pair(found, "ttft", 0), _pair(found, "tpot", 1),
            _number(found["longest_gap_p99"], 0), str(found["sent"] - found["answered"]),
            _number(_sum(line.get("recomputed") for line in mine), 0), _placed(mine), _energy(mine),
        ]) + " |")  # fmt: skip
    for line in lines:
        if line["step"] in ("note", "skipped", "error"):
            text.append(f"\n{line['step'].capitalize()}: {line['why']}")
    return "\n".join(text) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _pair(found: Mapping[str, float | None], name: str, digits: int) -> str:
    return f"{_number(found[f'{name}_p50'], digits)} / {_number(found[f'{name}_p99'], digits)}"


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _placed(lines: Sequence[Line]) -> str:
    """The shares of the ways that requests went."""
    counts: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        for way, count in (line.get("placed") or {}).items():
            counts[way] += count
    total = sum(counts.values())
    return ", ".join(f"{way} {count / total:.0%}" for way, count in counts.items() if count) if total else "–"


def _energy(lines: Sequence[Line]) -> str:
    known = [line for line in lines if line.get("joules") is not None and line.get("answered")]
    if not known:
        return "–"
    answered = sum(line["answered"] for line in known)
    gross = sum(line["joules"] for line in known) / answered
    idle = sum(line["joules_idle"] for line in known) / answered
    return f"{gross:.1f} ({gross - idle:.1f})"
