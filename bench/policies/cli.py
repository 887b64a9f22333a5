"""``python -m bench.policies``: every workload at two loads under every pair of policies."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.policies import capacity, report
from bench.policies.trial import Setup, Trial
from bench.policies.workloads import NAMES, arrivals, trace

POLICIES = (
    ("round_robin", "round_robin"),
    ("least_loaded", "least_loaded"),
    ("power_of_two", "power_of_two"),
    ("least_loaded", "joint"),
    ("session", "joint"),
    ("prefix_aware", "joint"),
)

RATES = {
    "chat": (250_000, 400_000), "shared": (120_000, 200_000), "tenants": (250_000, 450_000),
    "bursts": (100_000, 180_000), "random": (150_000, 240_000), "mixed": (200_000, 330_000),
}  # fmt: skip
"""Prompt tokens a second for four prefills. At the higher one round robin's are about busy; at the lower one not."""

TRACE_RATES = (80_000, 110_000)
LOADS = ("low", "high")
WARM_UP = 30.0
"""Seconds at the start that do not count: caches are empty, and every pair's first request makes a communicator."""

Task = tuple[str, str, int, Setup, int, float, str]


def one(task: Task) -> dict[str, Any]:
    """Run one trial."""
    workload, load, rate, setup, seed, seconds, file = task
    sessions = trace(Path(file), seconds, rate) if file else arrivals(workload, seed, seconds, rate)
    trial = Trial(setup, seed)
    trial.run(sessions)
    return {
        "workload": workload, "load": load, "rate": rate, "policy": _name(setup), "seed": seed,
        "figures": trial.figures(min(WARM_UP, seconds / 2)),
    }  # fmt: skip


def _name(setup: Setup) -> str:
    name = f"{setup.prefill}/{setup.decode}"
    return f"{name}, {setup.workers} workers" if setup.workers > 1 else name


def tasks(
    seconds: float, seeds: int, traces: Sequence[str], setup: dict[str, Any], workers: Sequence[int]
) -> list[Task]:
    """Everything that is to be run."""
    found: list[Task] = []
    setups = [Setup(p, d, **setup) for p, d in POLICIES]
    setups += [Setup("prefix_aware", "joint", **{**setup, "workers": count}) for count in workers]
    for workload in NAMES:
        for load, rate in zip(LOADS, RATES[workload], strict=True):
            share = rate * setup["prefills"] // 4
            found += [(workload, load, share, s, seed, seconds, "") for s in setups for seed in range(seeds)]
    for file in traces:
        for load, rate in zip(LOADS, TRACE_RATES, strict=True):
            share = rate * setup["prefills"] // 4
            found += [(Path(file).stem, load, share, s, 0, 1800.0, file) for s in setups]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables; write JSON and plots if requested."""
    parser = argparse.ArgumentParser(prog="bench.policies", description=__doc__)
    parser.add_argument("--short", action="store_true", help="40 seconds of each workload, one seed")
    parser.add_argument("--prefills", type=int, default=4)
    parser.add_argument("--decodes", type=int, default=4)
    parser.add_argument("--bound", type=float, default=2.0, help="LOAD_BOUND")
    parser.add_argument("--cache", type=int, default=Setup("", "").cache, help="tokens in one prefill's prefix cache")
    parser.add_argument("--trace", action="append", default=[], help="a Mooncake trace; may be repeated")
    parser.add_argument(
        "--workers", type=int, action="append", default=[], help="so many proxies with prefix_aware too"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the SVGs")
    parser.add_argument("--capacity", action="store_true", help="instead, how much load each policy carries")
    args = parser.parse_args(argv)
    seconds, seeds = (40.0, 1) if args.short else (120.0, 3)
    setup = {"prefills": args.prefills, "decodes": args.decodes, "bound": args.bound, "cache": args.cache}
    if args.capacity:
        return _capacities(Setup("", "", **setup), args.jobs, args.json)
    todo = tasks(seconds, seeds, args.trace, setup, args.workers)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        trials = []
        for trial in pool.imap_unordered(one, todo):
            trials.append(trial)
            print(f"\r{len(trials)} of {len(todo)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    order = {(*task[:2], _name(task[3])): at for at, task in enumerate(todo)}
    trials.sort(key=lambda t: (order[t["workload"], t["load"], t["policy"]], t["seed"]))
    rows = report.joined(trials)
    print(report.markdown(rows))
    means = {
        name: report.geometric(rows, name) for name in ("ttft_p50_ms", "ttft_p99_ms", "ttft_mean_ms", "itl_p99_ms")
    }
    print("\nGeometric mean of the ratio to round robin:\n")
    print("| prefill / decode | TTFT p50 | TTFT p99 | TTFT mean | inter-token p99 |\n|---|---|---|---|---|")
    for policy in means["ttft_p50_ms"]:
        print(f"| {policy} | " + " | ".join(f"{means[name][policy]:.2f}" for name in means) + " |")
    if args.json:
        text = json.dumps({"setup": setup, "seconds": seconds, "seeds": seeds, "rows": rows, "ratios": means}, indent=1)
        args.json.write_text(text + "\n")
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        for name, title, relative in (
            ("ttft_mean_ms", "Mean TTFT, as a share of round robin's (lower is better; cut at 1.5)", True),
            ("ttft_p99_ms", "TTFT p99, as a share of round robin's (lower is better; cut at 1.5)", True),
            ("hit_rate", "Share of prompt tokens found in prefill's cache", False),
        ):
            (args.plots / f"{name}.svg").write_text(report.bars(rows, name, title, relative=relative))
    return 0


def _capacities(base: Setup, jobs: int, file: Path | None) -> int:
    todo = [(setup, workload) for workload in NAMES for setup in capacity.setups(base)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        found = pool.map(capacity.capacity, todo, chunksize=1)
    carried: dict[str, dict[str, float]] = {}
    for workload, policy, rate in found:
        carried.setdefault(workload, {})[policy] = rate
    policies = list(next(iter(carried.values())))
    print("| prompt tokens a second | " + " | ".join(policies) + " |\n" + "|---" * (len(policies) + 1) + "|")
    for workload, rates in carried.items():
        first = rates[policies[0]]
        cells = [f"{rate / 1000:.0f}k ({rate / first:.2f}x)" for rate in rates.values()]
        print(f"| {workload} | " + " | ".join(cells) + " |")
    if file:
        file.write_text(json.dumps(carried, indent=1) + "\n")
    return 0
