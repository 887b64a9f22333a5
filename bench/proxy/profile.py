"""Where a proxy's CPU time goes under one workload: a flame graph, drawn by py-spy.

    python -m bench.proxy.profile W1 --out docs/img/profile-w1.svg
    python -m bench.proxy.profile W3_128 --out docs/img/profile-w3.svg

Needs py-spy (bench/requirements.txt), which reads the memory of the proxy: root, or ptrace allowed for one's own
processes (kernel.yama.ptrace_scope).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from bench.proxy import machine
from bench.proxy.machine import ROOT, Cores, Unable
from bench.proxy.measure import Bench, Failed, Started, bench, measure, started
from bench.proxy.peers import OURS, REFERENCE, peers
from bench.proxy.workloads import WORKLOADS, Workload

_LEAD = 1.5
"""Seconds of load before the first sample and after the last."""


def record(there: Bench, one: Started, load: Workload, seconds: int, out: Path) -> None:
    """Sample while the load runs.

    Raises:
        Unable: py-spy is missing or may not look.
        Failed: the proxy answered wrongly.
    """
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if spy is None:
        raise Unable("py-spy is not installed: pip install -r bench/requirements.txt")
    out.parent.mkdir(parents=True, exist_ok=True)
    failures: list[Failed] = []

    def put_load() -> None:
        try:
            measure(there, one, load, seconds=seconds + 2 * _LEAD)
        except Failed as failure:
            failures.append(failure)

    thread = threading.Thread(target=put_load)
    thread.start()
    time.sleep(load.warmup + _LEAD)
    # Its samples are taken on the load's core, and without stopping the proxy: it must not change what it shows.
    command = [spy, "record", "--nonblocking", "--rate", "500", "--duration", str(seconds), "--output", str(out)]
    done = subprocess.run([*command, "--pid", str(one.pids[0])], capture_output=True, text=True)
    thread.join()
    if done.returncode:
        raise Unable(f"py-spy: {(done.stderr or done.stdout).strip()}")
    if failures:
        raise failures[0]
    drawn = well_formed(out.read_text(encoding="utf-8"))
    for directory in (f"{Path(spy).parent}{os.sep}", f"{Path(sys.executable).parent}{os.sep}", f"{ROOT}{os.sep}"):
        drawn = drawn.replace(directory, "")
    out.write_text(drawn, encoding="utf-8")


def well_formed(svg: str) -> str:
    """Replace the characters that XML does not allow.

    py-spy copies the names of frames from the memory of a running process. A read that races with the process can
    bring NUL bytes instead of a name, and no browser shows such a file.
    """
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]+", "[unknown]", svg)


def main() -> int:
    """Exit code 0, 1 when the proxy failed, 2 when it cannot be done here."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxy.profile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--out", type=Path, required=True, help="SVG file")
    parser.add_argument("--peer", choices=(OURS, REFERENCE), default=OURS, help="whose (ours)")
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--envs", type=Path, default=ROOT / ".bench-envs", help="directory for programs")
    parser.add_argument("--ours-options", default="", metavar="FLAGS", help="more flags for this proxy, in one string")
    options = parser.parse_args()
    machine.end_on_sigterm()
    peer = peers(options=tuple(shlex.split(options.ours_options)))[options.peer]
    load = replace(WORKLOADS[options.workload], warmup=1.0)
    try:
        machine.check(Cores(0, 1))
        os.sched_setaffinity(0, {1})
        with (
            bench(Cores(0, 1), options.envs) as there,
            started(there, peer, peer.install(options.envs)) as one,
        ):
            record(there, one, load, options.seconds, options.out)
    except Unable as unable:
        print(f"python -m bench.proxy.profile: {unable}", file=sys.stderr)
        return 2
    except Failed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
