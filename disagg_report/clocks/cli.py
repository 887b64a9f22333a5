"""``clocks``: measures one setup over clocks into a report folder."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from datetime import datetime
from pathlib import Path

from disagg_power import owners
from disagg_power.devices import PowerError
from disagg_power.gpus import open_devices
from disagg_power.lease import Lease, LeaseError, guard_words
from disagg_report import machine
from disagg_report.arrivals import Workload
from disagg_report.clocks.folder import ClockHeader, ClockSetup, read_header, write_header, write_setup
from disagg_report.clocks.sweep import ClockPlan, ClockSweep
from disagg_report.folder import setup_folder
from disagg_report.open_loop import OpenLoopClient, key_from_environment
from disagg_report.progress import Progress
from disagg_report.slo import Slo


def add_options(command: argparse.ArgumentParser) -> None:
    """Those that `sweep` does not have too."""
    command.add_argument("--clocks", type=int, default=8, help="clocks of each role, evenly spaced")
    command.add_argument("--rounds", type=int, default=3, help="times that each clock is measured")
    command.add_argument("--settle", type=float, default=2.0, help="seconds from setting clocks to the measurement")
    command.add_argument("--rate", type=float, default=0.0,
                         help="requests/s; default: 60 %% of what default clocks serve within the SLO")  # fmt: skip
    command.add_argument("--together", action="store_true", help="all roles at the same clock")
    command.add_argument("--run-dir", type=Path, required=True, help="folder of the guard's state")
    command.add_argument("--owner", type=owners.parse, action="append", default=[], metavar="PID:START",
                         help="a process without which the sweep ends")  # fmt: skip
    command.add_argument("--backend", default="auto", help="what sets clocks")
    command.add_argument("--take-over", action="store_true", help="also GPUs whose clocks somebody else has set")


def _header(args: argparse.Namespace) -> ClockHeader:
    if (args.folder / "report.json").exists():
        return read_header(args.folder)
    now = datetime.now().astimezone()
    header = ClockHeader(
        now.isoformat(timespec="seconds"), Slo(args.slo_ttft_ms, args.slo_tpot_ms, args.slo_attainment),
        args.input_len, args.output_len, args.seconds, int(now.timestamp()), args.simulated,
        {**machine.facts(), **dict(args.fact)},
    )  # fmt: skip
    write_header(args.folder, header)
    return header


def rate_of(folder: Path) -> float:
    """The rate of an earlier setup of this report, so that all have the same; 0 where there is none."""
    path = next(iter(sorted(folder.glob("setups/*/run-*.json"))), None)
    return float(json.loads(path.read_text(encoding="utf-8"))["rate"]) if path else 0.0


async def run(args: argparse.Namespace, vocabulary: int) -> int:
    """Measure; the exit code. What cannot be set or read is one line."""
    roles = {role: tuple(names.split(",")) for role, names in args.gpus if names}
    environ = dict(os.environ)
    try:
        devices = open_devices(environ)
        words = guard_words(
            args.run_dir / "power.state", [gpu for gpus in roles.values() for gpu in gpus], args.backend,
            take_over=args.take_over,
        )  # fmt: skip
        lease = Lease(words, environ)
    except (PowerError, LeaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        header = _header(args)
        folder = setup_folder(args.folder, args.name)
        write_setup(folder, ClockSetup(args.name, args.title, args.kind, tuple(roles), args.together))
        workload = Workload(
            args.model, header.input_tokens, header.output_tokens, header.seconds, header.seed, vocabulary
        )
        client = OpenLoopClient(args.url, workload, key_from_environment(), args.patience)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        plan = ClockPlan(
            roles, args.clocks, args.rounds, args.rate or rate_of(args.folder), header.slo, header.seed, args.settle,
            max(1, args.warm_up), args.together,
        )  # fmt: skip
        sweep = ClockSweep(args.title, folder, plan, devices, lease, client, client.warm_up, Progress(sys.stderr),
                           stop, header.seconds, lambda: owners.any_runs(args.owner))  # fmt: skip
        return 0 if await sweep.run() else 130
    except (PowerError, LeaseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        lease.close()
        devices.close()
