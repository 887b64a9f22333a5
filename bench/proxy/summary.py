"""From the runs of several rounds to one figure each: medians, spread, and ratios to the other proxies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.proxy.peers import DIRECT, OURS

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """The median of a figure's rounds, and their least and greatest."""

    median: float
    least: float
    greatest: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure | None:
        """None without any value."""
        known = sorted(values)
        return cls(median(known), known[0], known[-1], len(known)) if known else None


def value(run: Run, name: str) -> float | None:
    """A figure of a run; "ttft_us.p50" for one within another."""
    found: Any = run
    for part in name.split("."):
        found = found.get(part) if found else None
    return None if found is None else float(found)


def figure(runs: Sequence[Run], peer: str, workload: str, name: str) -> Figure | None:
    """Over the rounds in which it is known."""
    return Figure.of(_by_round(runs, peer, workload, name).values())


def ratio(runs: Sequence[Run], workload: str, name: str, other: str, ours: str = OURS) -> Figure | None:
    """``ours`` / ``other``, round by round, since rounds differ more than what runs within one."""
    mine, theirs = (_by_round(runs, peer, workload, name) for peer in (ours, other))
    return Figure.of(mine[turn] / theirs[turn] for turn in mine.keys() & theirs.keys() if theirs[turn] > 0)


def added(runs: Sequence[Run], peer: str, workload: str, name: str) -> Figure | None:
    """What a proxy adds to the figure that clients have without one, round by round."""
    mine, direct = (_by_round(runs, one, workload, name) for one in (peer, DIRECT))
    return Figure.of(mine[turn] - direct[turn] for turn in mine.keys() & direct.keys())


def _by_round(runs: Sequence[Run], peer: str, workload: str, name: str) -> dict[Any, float]:
    found = {}
    for run in runs:
        known = value(run, name) if (run["peer"], run["workload"]) == (peer, workload) else None
        if known is not None:
            found[run["round"]] = known
    return found


def names(runs: Sequence[Run], key: str) -> list[str]:
    """The peers or workloads of the runs, in their order."""
    return list(dict.fromkeys(str(run[key]) for run in runs))
