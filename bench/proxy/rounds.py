"""Rounds: all proxies started, each workload put on one after the other, and what was too noisy once more."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.proxy import machine
from bench.proxy.machine import Cores
from bench.proxy.measure import Bench, Failed, Started, measure, started
from bench.proxy.peers import Missing, Peer
from bench.proxy.workloads import Workload

_LIBRARIES = ("quart", "uvicorn", "uvloop", "httptools", "aiohttp")


def new_results(cores: Cores, peers: Iterable[Peer]) -> dict[str, Any]:
    """Results without a run, and what a reader needs to know of them."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join(sys.orig_argv[1:])}",
        "machine": machine.describe(cores),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "titles": {peer.name: peer.title for peer in peers},
        "runs": [],
        "skipped": {},
    }


@dataclass
class Rounds:
    """Fills ``results`` and keeps them in a file as they grow.

    Attributes:
        patience: s to wait for quiet cores before each measurement.
        retries: how often a round comes back to what had too few clean seconds.
        noisy: take every second, clean or not.
    """

    bench: Bench
    loads: Sequence[Workload]
    results: dict[str, Any]
    out: Path
    patience: float
    retries: int
    noisy: bool = False

    def install(self, peers: Iterable[Peer], environments: Path) -> list[tuple[Peer, Path]]:
        """Those that can be had, with the directories of their programs."""
        found = []
        for peer in peers:
            try:
                found.append((peer, peer.install(environments)))
            except Missing as missing:
                self._skip(peer.title, str(missing))
        return found

    def run(self, chosen: Iterable[tuple[Peer, Path]]) -> None:
        """One round."""
        turn = 1 + max((run["round"] for run in self.results["runs"]), default=0)
        with contextlib.ExitStack() as stack:
            there = []
            for peer, programs in chosen:
                try:
                    there.append(stack.enter_context(started(self.bench, peer, programs)))
                except Failed as failure:
                    self._skip(peer.title, f"did not start: {failure}")
            wanted = [
                (load, one) for load in self.loads for one in there if one.pids or (load.paced and not load.memory)
            ]
            for _ in range(1 + self.retries):
                wanted = [(load, one) for load, one in wanted if not self._measure(turn, load, one)]

    def _measure(self, turn: int, load: Workload, one: Started) -> bool:
        """False when it is worth another try."""
        machine.wait_quiet(self.bench.cores, self.patience)
        key = {"peer": one.peer.name, "workload": load.name, "round": turn}
        runs = self.results["runs"]
        try:
            run = {**key, **measure(self.bench, one, load, seconds=load.slices if self.noisy else None)}
        except Failed as failure:
            self._skip(f"{one.peer.title}, {load.name}", str(failure))
            return True
        earlier = next((old for old in runs if key.items() <= old.items()), None)
        if earlier is None:
            runs.append(run)
        elif worth(run, load) > worth(earlier, load):
            runs[runs.index(earlier)] = run
        print(line(run, load.unit), flush=True)
        self._save()
        return worth(run, load) == 2

    def _skip(self, what: str, why: str) -> None:
        self.results["skipped"][what] = why
        print(f"{what}: {why}", flush=True)

    def _save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")


def worth(run: dict[str, Any], load: Workload) -> int:
    """2: all that is wanted of it is known; 1: CPU but no delays; 0: nothing."""
    if load.memory:
        return 2
    if run["cpu_us"] is None:
        return 0
    return 2 if run["clean_delay"] or not load.paced else 1


def line(run: dict[str, Any], unit: str) -> str:
    """What a run gave, for people who wait."""
    if unit == "stream":
        what = f"{run['rss_kb'] / 1024:8.1f} MiB with {run['open']} streams, {run['idle_kb'] / 1024:.1f} MiB idle"
    elif run["cpu_us"] is None:
        what = "no clean second"
    else:
        what = f"{run['cpu_us']:8.1f} µs per {unit}, {run['rate']:8.0f} {unit}s/s"
    for name in ("ttft", "delay"):
        if unit == "token" and (times := run[f"{name}_us"]):
            what += f", {name} {times['p50'] / 1000:.2f}/{times['p99'] / 1000:.2f} ms"
    return f"{run['workload']:8} {run['peer']:14} {what}  ({run['clean']}/{run['seconds']} s clean)"
