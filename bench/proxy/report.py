"""The results as Markdown tables.

python -m bench.proxy.report RESULTS.json...                        print them
python -m bench.proxy.report RESULTS.json... --page docs/performance.md    put them between the page's marks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.proxy.goals import goals
from bench.proxy.peers import COMPILED, DIRECT, OURS
from bench.proxy.summary import Figure, Run, added, figure, names, ratio
from bench.proxy.workloads import WORKLOADS

MARKS = ("<!-- figures: made by python -m bench.proxy.report -->", "<!-- end of figures -->")

SHARES = {"cpu_clean": "clean", "delay_clean": "clean_delay"}
"""Shares of all measured seconds, by the runs' counts of them."""


def load(paths: Sequence[Path]) -> dict[str, Any]:
    """Several results as one; rounds of different files stay apart."""
    files = [json.loads(path.read_text()) for path in paths]
    runs = [{**run, "round": f"{at}.{run['round']}"} for at, one in enumerate(files) for run in one["runs"]]
    total = sum(run["seconds"] for run in runs) or 1
    shares = {name: sum(run[key] for run in runs) / total for name, key in SHARES.items()}
    merged = {name: {k: v for one in files for k, v in one[name].items()} for name in ("titles", "skipped")}
    return {**files[0], **merged, **shares, "runs": runs}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; nothing without a row."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float) -> str:
    """Three digits that count."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def cell(found: Figure | None, scale: float = 1.0) -> str:
    """The median, and the spread where there is one."""
    if found is None:
        return "–"
    spread = f" ({number(found.least * scale)}–{number(found.greatest * scale)})" if found.rounds > 1 else ""
    return number(found.median * scale) + spread


def tables(results: Mapping[str, Any]) -> str:
    """All that the results hold."""
    runs: Sequence[Run] = results["runs"]
    titles: Mapping[str, str] = results["titles"]
    peers, done = names(runs, "peer"), names(runs, "workload")
    proxies = [peer for peer in peers if peer != DIRECT]
    loads = [w for w in WORKLOADS if w in done and not WORKLOADS[w].memory]
    held = [w for w in WORKLOADS if w in done and WORKLOADS[w].memory]
    paced = [w for w in loads if WORKLOADS[w].paced]

    def rows(of: Sequence[str], columns: Sequence[str], make: Callable[[str, str], str]) -> list[list[str]]:
        return [[titles[peer], *(make(peer, column) for column in columns)] for peer in of]

    mine = [peer for peer in (OURS, COMPILED) if peer in proxies]
    others = [peer for peer in proxies if peer not in mine]
    parts = [_goals(results, one) for one in reversed(mine)]
    for one in mine:
        parts += [
            f"CPU of {titles[one]}, as a ratio of each other's, round by round (below 1: less).\n",
            table(["", *loads], rows(others, loads, partial(_ratio, runs, one))),
        ]
    parts += [
        "CPU of the proxy, user and system, in µs per request (W1, W4) or token (W2, W3).\n",
        table(["", *loads], rows(proxies, loads, lambda p, w: cell(figure(runs, p, w, "cpu_us")))),
    ]
    if paced:
        parts.append(_delays(runs, peers, paced, titles))
    if held:
        parts += [
            "Resident memory in MiB: idle after the start, and with all streams open.\n",
            table(
                ["", "idle", *(f"{WORKLOADS[w].clients:,} streams" for w in held)],
                [
                    [titles[p], cell(figure(runs, p, held[0], "idle_kb"), 1 / 1024)]
                    + [cell(figure(runs, p, w, "rss_kb"), 1 / 1024) for w in held]
                    for p in proxies
                ],
            ),
        ]
    legend = [f"- {w}: {WORKLOADS[w].title}" for w in (*loads, *held)]
    skipped = [f"- not measured: {what}: {why}" for what, why in results["skipped"].items()]
    return "\n".join([part for part in parts if part] + ["\n".join([*legend, *skipped]) + "\n", _machine(results)])


def _goals(results: Mapping[str, Any], mine: str) -> str:
    """The goals that are missed, and how many are met."""
    found = list(goals(results, mine))
    missed = [[one.what, one.peer, cell(one.found), number(one.most)] for one in found if not one.met]
    if not found:
        return ""
    said = f"{results['titles'][mine]}: {len(found) - len(missed)} of {len(found)} goals are met"
    head = ["", "best peer there", "found", "goal, at most"]
    return said + (", all but:\n\n" + table(head, missed) if missed else ".\n")


def _ratio(runs: Sequence[Run], mine: str, other: str, workload: str) -> str:
    return cell(ratio(runs, workload, "cpu_us", other, ours=mine))


def _delays(runs: Sequence[Run], peers: Sequence[str], paced: Sequence[str], titles: Mapping[str, str]) -> str:
    """Delays of tokens and first tokens, without a proxy and what each adds."""
    rows = []
    direct = DIRECT in peers
    of = [peer for peer in peers if peer != DIRECT]
    for name in paced:
        for figure_name, what in (("ttft_us", "TTFT"), ("delay_us", "delay of a token")):
            for point in ("p50", "p99"):
                key = f"{figure_name}.{point}"
                row = [f"{name} {what}, {point}"]
                if direct:
                    row.append(cell(figure(runs, DIRECT, name, key), 1e-3))
                rows.append(row + [_delay(runs, peer, name, key, direct) for peer in of])
    head = ["", *(["no proxy"] if direct else []), *(titles[peer] for peer in of)]
    words = 'In ms: without a proxy, and what each adds ("in all" where the former is not known)' if direct else "In ms"
    return f"{words}. A token's delay goes from the engine's write to the client's read.\n\n" + table(head, rows)


def _delay(runs: Sequence[Run], peer: str, name: str, key: str, direct: bool) -> str:
    more = added(runs, peer, name, key) if direct else None
    if more is not None:
        return cell(more, 1e-3)
    whole = figure(runs, peer, name, key)
    return cell(whole, 1e-3) + (" in all" if direct and whole else "")


def _machine(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rounds = max(Counter((run["peer"], run["workload"]) for run in results["runs"]).values())
    return (
        f"{results['date']}; {m['cpu']}, {m['cores']} cores, proxy on core {m['proxy_core']}, load and engines on core "
        f"{m['load_core']}; Linux {m['kernel']}, Python {m['python']}, {versions}; {rounds} round(s) at most, "
        f"medians, spread in brackets; {results['cpu_clean']:.0%} of all measured seconds were clean enough for CPU, "
        f"{results['delay_clean']:.0%} for delays.\n"
    )


def put(page: str, text: str) -> str:
    """The page with the text between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, found, rest = page.partition(MARKS[0])
    _, ends, after = rest.partition(MARKS[1])
    if not (found and ends):
        raise ValueError("the page has no marks for the figures")
    return f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}"


def fill(results: Sequence[Path], page: Path) -> None:
    """Make the page's figures and picture anew; without matplotlib the picture stays as it is, which is said."""
    from bench.proxy.plot import draw

    found = load(results)
    page.write_text(put(page.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")
    try:
        draw(found, page.parent / "img" / "performance.svg")
    except ModuleNotFoundError as missing:
        print(f"no picture: {missing}; pip install -r bench/requirements.txt", file=sys.stderr)


def main() -> int:
    """Print, or fill the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.report", description="results as Markdown")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="put them between the marks of this page")
    options = parser.parse_args()
    if options.page:
        fill(options.results, options.page)
    else:
        print(tables(load(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
