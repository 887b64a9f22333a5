"""``python -m bench.elastic``: every workload on every arm, knees and goals."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.elastic import report
from bench.elastic.arms import arms
from bench.elastic.sweep import PACES, Series, Settings, goals, measure
from bench.elastic.trial import Slo
from bench.elastic.workloads import NAMES
from disagg_sim.step_model import H200, ProfileError, load_profile

KV_TOKENS = 271_000
"""40 GB at 147,456 bytes a token."""

SCARCE_KV_TOKENS = 67_816
"""10 GB, as in the measurement that the profile is from; overload is tried with it."""


def series(workloads: Sequence[str], gpus: Sequence[int], kinds: Sequence[str]) -> list[Series]:
    """Everything that is measured with the large KV cache."""
    found = []
    for count in gpus:
        for workload in workloads:
            found += [Series(workload, count, arm) for arm in arms(count) if arm.kind in kinds]
    if "2000/128" in workloads:
        least = min(gpus)
        found += [
            Series("2000/128", least, arm, paces) for paces in PACES[1:] for arm in arms(least) if arm.kind in kinds
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables; write JSON and plots if requested."""
    parser = argparse.ArgumentParser(prog="bench.elastic", description=__doc__)
    parser.add_argument("--short", action="store_true", help="two GPUs, two seeds, 20 s of each rate")
    parser.add_argument("--gpus", type=int, action="append", help="number of GPUs; may be repeated (default: 2, 4, 8)")
    parser.add_argument("--workload", choices=NAMES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--kind", choices=("plain", "split", "elastic"), action="append", help="default: all")
    parser.add_argument("--profile", default=H200, help="engine profile: a file or an installed one")
    parser.add_argument("--kv-tokens", type=int, default=KV_TOKENS, help="KV cache of an engine; 0: the profile's")
    parser.add_argument("--seeds", type=int, help="default: 5, or 2")
    parser.add_argument("--seconds", type=float, help="of arrivals at each rate (default: 40, or 20)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the SVGs")
    args = parser.parse_args(argv)
    gpus = args.gpus or ([2] if args.short else [2, 4, 8])
    if min(gpus) < 2:
        parser.error("--gpus: at least 2, one for each role")
    try:
        load_profile(args.profile)
    except ProfileError as error:
        parser.error(f"--profile: {error}")
    seconds = args.seconds or (20.0 if args.short else 40.0)
    seeds = args.seeds or (2 if args.short else 5)
    settings = Settings(args.profile, args.kv_tokens, seconds, seconds / 4, seeds, Slo())
    kinds = args.kind or ["plain", "split", "elastic"]
    workloads = args.workload or list(NAMES)
    todo = [(settings, one) for one in series(workloads, gpus, kinds)]
    scarce = Settings(args.profile, SCARCE_KV_TOKENS, seconds, seconds / 4, seeds, Slo())
    if "2000/128" in workloads:
        todo += [
            (scarce, Series("2000/128", min(gpus), arm, overload=True)) for arm in arms(min(gpus)) if arm.kind in kinds
        ]
    begun = time.monotonic()
    results: list[dict[str, Any]] = []
    overloaded: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for (_, task), one in zip(todo, pool.imap(measure, todo, chunksize=1), strict=True):
            (overloaded if task.overload else results).append(one)
            print(f"\r{len(results) + len(overloaded)} of {len(todo)}", end="", file=sys.stderr, flush=True)
            if args.json:
                # After each, so that a run that is stopped leaves what it has found.
                found = {
                    "seconds": seconds, "seeds": seeds, "kv_tokens": args.kv_tokens, "profile": args.profile,
                    "took_seconds": round(time.monotonic() - begun, 1), "goals": goals(results), "results": results,
                    "overload": overloaded,
                }  # fmt: skip
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(file=sys.stderr)
    print(report.knees(results), report.overloads(overloaded), report.latencies(results), sep="\n\n")
    if args.plots:
        report.plots(results, args.plots)
    return 0
