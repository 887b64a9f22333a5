"""The whole table of docs/performance.md from one command: all proxies, all workloads, three rounds.

    python -m bench.proxy.table            about 50 minutes on two quiet cores
    python -m bench.proxy.table --short    at most 12 minutes: shorter measurements, no memory of 1,000 streams, and no
                                           reference; the same columns, proxies and rounds otherwise

Builds and installs what is missing first (.bench-envs; the compiled proxy takes two minutes once). Then it fills the
page and its picture, records bench/proxy/expected.json for CI, and prints the goals and the README's sentence.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.proxy import machine, report, short
from bench.proxy.goals import sentence
from bench.proxy.machine import ROOT, Cores, Unable
from bench.proxy.measure import bench
from bench.proxy.peers import REFERENCE, peers
from bench.proxy.rounds import Rounds, new_results
from bench.proxy.workloads import WORKLOADS, Workload

_SHORT_SLICES = 2
_SHORT_RAMP = {"W3": 0.64, "M": 8.0}


def shortened(load: Workload) -> Workload:
    """The same load, measured for two seconds after a short warm-up."""
    if load.memory:
        ramp = _SHORT_RAMP["M"]
        return replace(load, ramp=ramp, warmup=ramp + 3, slices=_SHORT_SLICES)
    if load.paced:
        # A stream has 128 tokens of 10 ms: in the second after the ramp all of them are open.
        ramp = _SHORT_RAMP["W3"]
        return replace(load, ramp=ramp, warmup=ramp + 0.6, slices=_SHORT_SLICES)
    return replace(load, warmup=0.5, slices=_SHORT_SLICES)


def chosen_loads(is_short: bool) -> list[Workload]:
    """The columns, memory first."""
    if not is_short:
        return list(WORKLOADS.values())
    return [shortened(load) for name, load in WORKLOADS.items() if name != "M1000"]


def _measure(options: argparse.Namespace, cores: Cores) -> bool:
    """Whether anything was measured; the results are in ``options.out``."""
    known = peers()
    left_out = {REFERENCE} if options.short else set()
    names = known.keys() - left_out if options.peers == "all" else options.peers.split(",")
    if unknown := set(names) - known.keys():
        raise Unable(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [peer for name, peer in known.items() if name in names]
    loads: Sequence[Workload] = chosen_loads(options.short)
    results = new_results(cores, wanted)
    with bench(cores, options.envs) as there:
        patience, retries = (2.0, 0) if options.short or options.noisy else (20.0, 2)
        rounds = Rounds(there, loads, results, options.out, patience, retries, options.noisy)
        chosen = rounds.install(wanted, options.envs)
        for turn in range(options.rounds):
            begun = time.monotonic()
            rounds.run(chosen)
            if options.short:
                # Memory differs little between rounds.
                rounds.loads = [load for load in loads if not load.memory]
            print(f"round {turn + 1} of {options.rounds}: {time.monotonic() - begun:.0f} s", flush=True)
    return bool(results["runs"])


def main() -> int:
    """The exit code: 0, 1 when nothing could be measured, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.proxy.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="the reduced form, at most 12 minutes")
    parser.add_argument("--peers", default="all", help="comma-separated: " + ", ".join(peers()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), help="file for the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="page to fill")
    parser.add_argument("--envs", type=Path, default=ROOT / ".bench-envs", help="directory for programs and peers")
    parser.add_argument("--cores", default="0,1", metavar="PROXY,LOAD", help="the proxy's core and the load's (0,1)")
    parser.add_argument("--noisy", action="store_true", help="count seconds with other work too: for a rehearsal")
    options = parser.parse_args()
    try:
        proxy, load = map(int, options.cores.split(","))
    except ValueError:
        parser.error("--cores wants two numbers, as in 0,1")
    cores, begun = Cores(proxy, load), time.monotonic()
    machine.end_on_sigterm()
    try:
        machine.check(cores)
        os.sched_setaffinity(0, {cores.load})
        if not _measure(options, cores):
            print("nothing was measured")
            return 1
        report.fill([options.out], options.page)
        found = report.load([options.out])
        print("\n" + report.tables(found))
        print("For the README:\n" + sentence(found) + "\n")
        os.sched_setaffinity(0, {cores.proxy, cores.load})
        short.run(cores, options.envs, record=True)
    except Unable as unable:
        print(f"python -m bench.proxy.table: {unable}", file=sys.stderr)
        return 2
    print(f"{(time.monotonic() - begun) / 60:.1f} minutes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
