"""Writes ``summary.md``, the page of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disagg_report.figures import MIN_FOR_P99, Figures
from disagg_report.folder import Report
from disagg_report.open_loop import OpenLoopClient
from disagg_report.placed import shares
from disagg_report.verdict import Outcome, outcomes, verdict

_LATE_MS = 50.0
_BUSY = 0.9
_DEVIATES = 0.05
"""Share by which counter and integral may differ without a note."""
_TITLES = {
    "sweep": "Prefill and decode under load",
    "ratio": "Which ratio of prefill to decode",
}


def summary(report: Report, plots: Sequence[Path], no_plots: str = "") -> str:
    """Return the text. ``no_plots``: why there are no plots."""
    header = report.header
    every = outcomes(report)
    parts = [f"# {_TITLES.get(header.question, 'Report')}", f"{header.made}"]
    if header.simulated:
        parts.append(
            "> **SIMULATED ENGINES. No model ran and no GPU was used: all figures below come from simulated"
            " engines and do not apply to real ones.**"
        )
    if any(one.setup.client == OpenLoopClient.name for one in every):
        parts.append(
            "> **Load generator: the project's own**, not `vllm bench serve` (BENCH_CLIENT chooses; it needs vLLM)."
        )
    parts += [f"**{verdict(report)}**", f"SLO: {header.slo}."]
    parts.append(
        f"Each request: {header.input_tokens} tokens of prompt, {header.output_tokens} tokens of answer, streamed;"
        f" Poisson arrivals, an open loop, {header.seconds:g} s for each rate."
    )
    if len(every) > 1:
        parts.append(_comparison(every))
    for one in every:
        parts.append(_setup(one))
    parts.append("## Plots")
    parts += [f"![{path.stem}]({path.name})" for path in plots] or [f"None: {no_plots}"]
    parts += ["## Terms", _WORDS, "## Machine, versions, settings", _facts(header.facts), _FILES]
    return "\n\n".join(parts) + "\n"


def _comparison(every: Sequence[Outcome]) -> str:
    lines = [
        "| setup | requests/s within the SLO | highest rate kept | limit reached |",
        "|---|---:|---:|---|",
    ]
    for one in every:
        best = f"{one.best.rate:g}" if one.best else "none"
        lines.append(f"| {one.setup.title} | {one.capacity:.2f} | {best} | {'yes' if one.reached else 'no'} |")
    return "\n".join(lines)


def _setup(one: Outcome) -> str:
    roles = sorted({role for rate in one.rates for role in rate.power})
    heads = ["requests/s", "sent", "answered", "within SLO", "goodput /s", "SLO", "TTFT ms p50 / p99",
             "inter-token ms p50 / p99", "TPOT ms p50 / p99", "output tokens/s"]  # fmt: skip
    heads += [f"{role} GPUs W / J per output token" for role in roles]
    lines = [f"## {one.setup.title}", "", "| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    lines += ["| " + " | ".join(_row(rate, roles)) + " |" for rate in one.rates]
    lines += ["", *(f"- {note}" for note in _notes(one))]
    return "\n".join(lines)


def _row(rate: Figures, roles: Sequence[str]) -> list[str]:
    few = "*" if rate.answered < MIN_FOR_P99 else ""
    kept = "cut short" if rate.interrupted else "kept" if rate.kept else "**broken**"
    cells = [
        f"{rate.rate:g}", f"{rate.sent}", f"{rate.answered}", f"{rate.share:.0%}", f"{rate.goodput:.2f}", kept,
        _pair(rate.ttft_ms, few, 0), _pair(rate.itl_ms, "", 1), _pair(rate.tpot_ms, few, 1),
        f"{rate.output_tokens_per_s:.0f}",
    ]  # fmt: skip
    for role in roles:
        power, joules = rate.power.get(role), rate.joules_per_token.get(role)
        cells.append("–" if power is None else f"{power.watts:.0f} / " + ("–" if joules is None else f"{joules:.3f}"))
    return cells


def _pair(values: tuple[float | None, float | None], mark: str, digits: int) -> str:
    p50, p99 = values
    return "–" if p50 is None or p99 is None else f"{p50:.{digits}f} / {p99:.{digits}f}{mark}"


def _notes(one: Outcome) -> list[str]:
    notes = [f"Load from {one.setup.client}.", f"The sweep ended because {one.setup.ended or 'it was stopped'}."]
    notes += one.setup.notes
    if any(rate.answered < MIN_FOR_P99 for rate in one.rates):
        notes.append(f"\\* the largest of fewer than {MIN_FOR_P99} values.")
    if one.setup.no_power:
        notes.append(f"Power was not measured: {one.setup.no_power}.")
    powers = [power for rate in one.rates for power in rate.power.values()]
    if any(power.source == "integral" for power in powers):
        notes.append("Energy is the integral of power, which has an error of 5 % and more: a GPU has no counter.")
    worst = max((abs(power.deviation) for power in powers if power.deviation is not None), default=0.0)
    if worst > _DEVIATES:
        notes.append(f"The integral of power deviates from the GPUs' energy counters, which are used, by {worst:.0%}.")
    for rate in one.rates:
        if placed := shares(rate.placed):
            notes.append(f"At {rate.rate:g} requests/s requests were placed: {placed}.")
        late = rate.late_ms is not None and rate.late_ms > _LATE_MS
        busy = rate.client_cpu is not None and rate.client_cpu > _BUSY
        if late or busy:
            notes.append(
                f"**At {rate.rate:g} requests/s the load generator itself could not keep up** (it used"
                f" {rate.client_cpu or 0:.0%} of a core and sent one of a hundred requests {rate.late_ms or 0:.0f} ms"
                " late or more): latencies there may be the load generator's."
            )
        for error in rate.errors:
            plain = error.replace("|", "/").replace("`", "'")
            notes.append(f"Failed at {rate.rate:g} requests/s, {rate.sent - rate.answered} in all, such as: `{plain}`")
    return notes


def _facts(facts: dict[str, str]) -> str:
    lines = ["| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value.replace('|', '/')} |" for name, value in facts.items()])


_WORDS = """\
- **TTFT**: from sending a request to its first token. **Inter-token**: between two events of one stream, of all
  streams together. **TPOT**: mean time per output token after the first, of one request.
- **Within SLO**: share of the requests sent that were answered with TTFT and TPOT in time; a failed one is not.
  **Goodput**: the rate times that share (`vllm bench serve` divides by the total time instead, with the wait for the
  last responses). **Kept**: the share is at least what the SLO requires.
- **J per output token**: energy of the role's GPUs (NVML, error up to 5 %) over all output tokens, so those of prefill
  and decode add up."""

_FILES = """\
Every request is in `setups/*/rate-*.json`; `python -m disagg_report write FOLDER` makes this page and the plots again
from them, also for another SLO: `--slo-ttft-ms`, `--slo-tpot-ms`, `--slo-attainment`."""
