"""Compare the proxies.

    python -m bench.proxy                                  all peers, all workloads, three rounds: about 40 minutes
    python -m bench.proxy.table                            the same, and the page and expected.json made anew
    python -m bench.proxy --peers ours,vllm-router --workloads W1,W3_128 --rounds 1
    python -m bench.proxy --short                          what CI runs: this proxy against the reference, one minute

All proxies of a round run at the same time and are loaded one after the other, workload by workload, so that what is
compared is measured within a minute or two; what had no clean second is measured again at the round's end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from bench.proxy import machine, report, short
from bench.proxy.machine import ROOT, Cores, Unable
from bench.proxy.measure import bench
from bench.proxy.peers import Peer, peers
from bench.proxy.rounds import Rounds, new_results
from bench.proxy.workloads import WORKLOADS, Workload


def _choice(text: str, known: dict[str, Any], what: str) -> list[Any]:
    if text == "all":
        return list(known.values())
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise Unable(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = set(text.split(","))
    return [one for name, one in known.items() if name in wanted]


def _compare(options: argparse.Namespace, cores: Cores) -> int:
    known = peers(options.example_proxy, tuple(shlex.split(options.ours_options)))
    wanted: list[Peer] = _choice(options.peers, known, "peer")
    loads: list[Workload] = _choice(options.workloads, WORKLOADS, "workload")
    results = new_results(cores, wanted)
    if options.example_proxy is None and options.peers == "all":
        results["skipped"]["vLLM's example proxy"] = "not given (--example-proxy FILE)"
    with bench(cores, options.envs) as there:
        rounds = Rounds(there, loads, results, options.out, options.patience, options.retries)
        chosen = rounds.install(wanted, options.envs)
        for _ in range(options.rounds):
            rounds.run(chosen)
    if not results["runs"]:
        print("nothing was measured")
        return 1
    print("\n" + report.tables(report.load([options.out])))
    if options.page:
        report.fill([options.out], options.page)
    return 0


def main() -> int:
    """The exit code: 0, 1 when nothing could be measured or --short found a regression, 2 for a wrong command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.proxy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default="all", help="comma-separated: " + ", ".join(peers(Path("-"))))
    parser.add_argument("--workloads", default="all", help="comma-separated: " + ", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), help="file for the results")
    parser.add_argument("--page", type=Path, help="page whose figures and picture are made anew in the end")
    parser.add_argument("--envs", type=Path, default=ROOT / ".bench-envs", help="directory for programs and peers")
    parser.add_argument("--example-proxy", type=Path, metavar="FILE", help="vLLM's disagg_proxy_p2p_nccl_xpyd.py")
    parser.add_argument("--ours-options", default="", metavar="FLAGS", help="more flags for this proxy, in one string")
    parser.add_argument("--cores", default="0,1", metavar="PROXY,LOAD", help="the proxy's core and the load's (0,1)")
    parser.add_argument("--patience", type=float, default=20.0, help="s to wait for quiet cores each time (20)")
    parser.add_argument("--retries", type=int, default=2, help="per round, of what had no clean second (2)")
    parser.add_argument("--short", action="store_true", help="only whether this proxy got worse; for CI")
    parser.add_argument("--record", action="store_true", help="with --short: take what is measured as expected")
    options = parser.parse_args()
    try:
        proxy, load = map(int, options.cores.split(","))
    except ValueError:
        parser.error("--cores wants two numbers, as in 0,1")
    cores = Cores(proxy, load)
    machine.end_on_sigterm()
    try:
        if options.short:
            return short.run(cores, options.envs, options.record)
        machine.check(cores)
        os.sched_setaffinity(0, {load})
        return _compare(options, cores)
    except Unable as unable:
        print(f"python -m bench.proxy: {unable}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
