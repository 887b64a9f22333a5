"""``disagg-proxy power hold``: asks the guard for each role's clocks and keeps the lease while the owners run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from disagg_power import owners, state_file, status_file
from disagg_power.backends import NAMES
from disagg_power.clock_values import parse_clock, parse_watts
from disagg_power.devices import PowerError
from disagg_power.governing import Governing, Objective, laws
from disagg_power.governor import Governor
from disagg_power.gpus import open_devices
from disagg_power.holder import Holder, RoleSetting
from disagg_power.lease import Lease, LeaseError, guard_words
from disagg_power.owners import Process
from disagg_power.proxy_figures import scrape
from disagg_power.status_file import FAILED, Status

BEAT = 0.5
"""Seconds between two signs of life to the guard."""
ROLES = ("prefill", "decode")


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``hold``."""
    hold = commands.add_parser(
        "hold",
        help="set each role's clocks for as long as this process and its owners run",
        description="Starts the guard and keeps its lease. `machine all` runs it; see docs/clocks.md.",
    )
    hold.add_argument("--run-dir", type=Path, default=Path(os.environ.get("RUN_DIR") or "run"), metavar="FOLDER",
                      help="of the files power.state and power.status")  # fmt: skip
    hold.add_argument("--backend", choices=NAMES, default="auto", help="what sets clocks")
    hold.add_argument("--take-over", action="store_true", help="also GPUs whose clocks somebody else has set")
    hold.add_argument("--owner", type=owners.parse, action="append", default=[], metavar="PID:START",
                      help="a process for which clocks are set; when none of them runs, this one ends")  # fmt: skip
    hold.add_argument("--governor", choices=("off", "slo"), default="off",
                      help="slo: choose SM clocks by what the proxy sees; --ROLE-sm is the lowest")  # fmt: skip
    hold.add_argument("--metrics", default="http://127.0.0.1:10001/metrics", metavar="URL", help="of the proxy")
    hold.add_argument("--slo-ttft-ms", type=float, default=1000.0, help="SLO of the governor")
    hold.add_argument("--slo-tpot-ms", type=float, default=50.0, help="SLO of the governor")
    for role in ROLES:
        hold.add_argument(f"--{role}-gpus", default="", metavar="GPUS", help=f"of {role}, such as 0,1")
        hold.add_argument(f"--{role}-sm", default="", metavar="MHZ", help=f"SM clock of {role}: a cap, or lock:MHZ")
        hold.add_argument(f"--{role}-memory", default="", metavar="MHZ", help=f"memory clock of {role}, likewise")
        hold.add_argument(f"--{role}-power", default="", metavar="WATTS", help=f"power limit of {role}'s GPUs")
    hold.set_defaults(run=run_hold)


def role_settings(args: argparse.Namespace) -> dict[str, RoleSetting]:
    """By role.

    Raises:
        BadValue: a clock or power limit that is none.
    """
    found = {}
    for role in ROLES:
        gpus, sm, memory, power = (getattr(args, f"{role}_{name}") for name in ("gpus", "sm", "memory", "power"))
        parse_clock(sm), parse_clock(memory), parse_watts(power)
        found[role] = RoleSetting(tuple(filter(None, gpus.split(","))), sm, memory, power)
    return found


def run_hold(args: argparse.Namespace) -> int:
    """The process."""
    try:
        roles = role_settings(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    gpus = [gpu for setting in roles.values() for gpu in setting.gpus]
    words = guard_words(args.run_dir / state_file.NAME, gpus, args.backend, take_over=args.take_over)
    fixed = roles if args.governor == "off" else {role: replace(one, sm="") for role, one in roles.items()}
    holder = Holder(fixed, lambda: Lease(words), args.run_dir / status_file.NAME, say)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    try:
        step = _governing(args, holder, roles).step if args.governor == "slo" else nothing
    except PowerError as error:
        holder.note(Status(os.getpid(), FAILED, str(error), "device"))
        say(str(error))
        return 1
    if not holder.begin():
        if holder.lease is not None:
            holder.lease.close()
        return 1
    return holder.end(keep(holder, args.owner, ended, step))


def _governing(args: argparse.Namespace, holder: Holder, roles: Mapping[str, RoleSetting]) -> Governing:
    slo = Objective(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3)
    devices = open_devices(dict(os.environ))
    try:
        governor = Governor(laws(roles, devices, slo))
    finally:
        devices.close()
    key = os.environ.get("API_KEY", "")
    return Governing(holder, roles, governor, lambda: scrape(args.metrics, key), say, time.monotonic)


def nothing() -> None:
    """The step of no governor."""


def keep(
    holder: Holder, owned_by: Sequence[Process], ended: threading.Event, step: Callable[[], None] = nothing
) -> str:
    """Signs of life to the guard, and a step of the governor after each, until the end; why it came."""
    while not ended.wait(BEAT):
        if not owners.any_runs(owned_by):
            return "the processes for which clocks were set have ended"
        try:
            assert holder.lease is not None
            holder.lease.beat()
            step()
        except LeaseError as error:
            return str(error)
    return "stopped"


def say(line: str) -> None:
    """One line for the log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} power: {line}", flush=True)
