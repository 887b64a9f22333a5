"""What this project wants of its proxy beside the fastest other one of each column, and whether a run shows it.

The fastest is chosen column by column, so one proxy that is good at a single thing counts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.proxy.peers import COMPILED, DIRECT, OURS, REFERENCE
from bench.proxy.summary import Figure, Run, added, names, ratio
from bench.proxy.workloads import WORKLOADS

INTERPRETED = 1.0
"""CPU, as a ratio of the fastest peer's, that this proxy stays below as plain Python."""

NATIVE = {"W1": 0.45, "W2": 0.5, "W3": 0.85, "W3L": 0.85, "W4": 0.45}
"""The same for the compiled proxy, by the column's name up to ``_``; 1.0 for the others."""

MEMORY = 0.5
"""Resident memory with the most streams open, as a ratio of the leanest peer's."""


class Goal(NamedTuple):
    """One line: what is measured, whose figure it is compared with, the figure, and what it should be at most."""

    what: str
    peer: str
    found: Figure
    most: float

    @property
    def met(self) -> bool:
        """Whether the median is as wanted."""
        return self.found.median <= self.most


def others(runs: Sequence[Run]) -> list[str]:
    """The proxies that people use instead of this one."""
    return [peer for peer in names(runs, "peer") if peer not in (OURS, COMPILED, DIRECT, REFERENCE)]


def against_fastest(runs: Sequence[Run], mine: str, workload: str, name: str = "cpu_us") -> tuple[str, Figure] | None:
    """The peer with the least of a figure, and the ratio of this proxy's to it."""
    found = [(peer, ratio(runs, workload, name, peer, ours=mine)) for peer in others(runs)]
    known = [(peer, one) for peer, one in found if one is not None]
    return max(known, key=lambda one: one[1].median, default=None)


def goals(results: Mapping[str, Any], mine: str) -> Iterator[Goal]:
    """Every goal that the results can show for this proxy, ``mine`` being OURS or COMPILED."""
    runs: Sequence[Run] = results["runs"]
    titles: Mapping[str, str] = results["titles"]
    for workload in (w for w in WORKLOADS if w in names(runs, "workload")):
        held = WORKLOADS[workload].memory
        found = against_fastest(runs, mine, workload, "rss_kb" if held else "cpu_us")
        if found is not None:
            native = NATIVE.get(workload.partition("_")[0], INTERPRETED)
            most = MEMORY if held else native if mine == COMPILED else INTERPRETED
            yield Goal(f"{workload}, {'memory' if held else 'CPU'}", titles[found[0]], found[1], most)
        if WORKLOADS[workload].paced:
            yield from _delays(runs, titles, mine, workload)


def _delays(runs: Sequence[Run], titles: Mapping[str, str], mine: str, workload: str) -> Iterator[Goal]:
    """What this proxy adds to first tokens and to each token, in ms, at most what the best peer adds."""
    for key, what in (("ttft_us", "TTFT"), ("delay_us", "delay of a token")):
        for point in ("p50", "p99"):
            of = {peer: added(runs, peer, workload, f"{key}.{point}") for peer in (mine, *others(runs))}
            found = of.pop(mine)
            known = {peer: one.median for peer, one in of.items() if one is not None}
            if found is not None and known:
                best = min(known, key=lambda peer: known[peer])
                scaled = Figure(found.median / 1e3, found.least / 1e3, found.greatest / 1e3, found.rounds)
                yield Goal(f"{workload}, added {what}, {point}, ms", titles[best], scaled, known[best] / 1e3)


def sentence(results: Mapping[str, Any]) -> str:
    """The README's line on what the proxy costs, with the figures of these results."""
    runs = results["runs"]
    parts = []
    for mine, how in ((COMPILED, "compiled"), (OURS, "as Python")):
        found = {w: against_fastest(runs, mine, w) for w in ("W1", "W3_128", "W4_64k")}
        if all(found.values()):
            a, b, c = (one[1].median for one in found.values() if one is not None)
            parts.append(
                f"{how} it takes {a:.2f} of the CPU of the fastest other router for a small request, {b:.2f} for a "
                f"paced token, {c:.2f} for a prompt of 64 KiB"
            )
    if not parts:
        return ""
    names_of = " and ".join(results["titles"][peer].removesuffix(" (Rust)") for peer in others(runs))
    return f"Beside {names_of}: {'; '.join(parts)}."
