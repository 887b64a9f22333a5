"""Subcommands of ``disagg-proxy power`` that have to do with clocks: ``guard``, ``clocks`` and ``reset``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from disagg_power import guard_process, state_file
from disagg_power.backends import NAMES, candidates, choose
from disagg_power.devices import NoPermission, NotSupported, PowerError, throttle_names
from disagg_power.gpus import open_devices
from disagg_power.guard import Guard
from disagg_power.owners import Process
from disagg_power.state_file import BadState, State, claims_folder
from disagg_power.undo import undo_file


def words(text: str) -> list[str]:
    """GPUs, separated by commas."""
    return [word for word in text.split(",") if word]


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add these commands; each sets ``run``, which takes the arguments and returns the exit code."""
    guard = commands.add_parser(
        "guard",
        help="set clocks for the process at its standard input, and reset them when that is gone",
        description="Sets clocks by requests on standard input, one JSON object a line, and resets them at its end, "
        "after 5 s without a line, and on SIGTERM. `machine all` starts it; see docs/clocks.md.",
    )
    guard.add_argument("--gpus", type=words, required=True, metavar="GPUS", help="those it may set, such as 0,1")
    guard.add_argument("--backend", choices=NAMES, default="auto", help="what sets clocks")
    guard.add_argument("--take-over", action="store_true", help="also GPUs whose clocks somebody else has set")
    guard.set_defaults(run=run_guard)
    clocks = commands.add_parser("clocks", help="which clocks may be set, by what, and what is set; changes nothing")
    clocks.add_argument("--json", action="store_true", help="for programs")
    clocks.set_defaults(run=run_clocks)
    reset = commands.add_parser("reset", help="reset what a guard has left that was killed")
    reset.set_defaults(run=run_reset)
    for parser in (guard, clocks, reset):
        parser.add_argument("--state", type=Path, default=Path(os.environ.get("RUN_DIR") or "run") / state_file.NAME,
                            metavar="FILE", help="what a guard changed (default: power.state in RUN_DIR)")  # fmt: skip


def run_guard(args: argparse.Namespace) -> int:
    """The guard. What keeps it from starting goes to standard output too, for the holder of the lease."""
    environ = dict(os.environ)
    try:
        devices = open_devices(environ)
        backend = choose(args.backend, devices.all(), environ)
        undone = undo_file(args.state, lambda: devices, claims_folder(environ), environ)
        if undone.held or undone.failed:
            raise PowerError(f"what an earlier guard has set is not reset: {undone.held or '; '.join(undone.failed)}")
        watch = guard_process.Watcher(args.state, environ)
        guard = Guard(devices, args.gpus, backend, args.state, claims_folder(environ), time.monotonic,
                      take_over=args.take_over, beat=watch.beat)  # fmt: skip
    except (PowerError, BadState, OSError) as error:
        kind = "permission" if isinstance(error, NoPermission) else "device"
        print(json.dumps({"ready": False, "kind": kind, "error": str(error)}), flush=True)
        guard_process.say(str(error))
        return 1
    return guard_process.run(guard, watch, guard_process.say)


def run_reset(args: argparse.Namespace) -> int:
    """Reset what a killed guard has left."""
    environ = dict(os.environ)
    try:
        done = undo_file(args.state, lambda: open_devices(environ), claims_folder(environ), environ)
    except (PowerError, BadState) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if done.held:
        print(f"nothing was reset: {done.held}; stop what runs", file=sys.stderr)
        return 1
    for index in done.gpus:
        print(f"GPU {index}: clocks and power limit are as they were before")
    for failure in done.failed:
        print(f"error: not reset: {failure}", file=sys.stderr)
    if not done.gpus and not done.failed:
        print("nothing to reset")
    return int(bool(done.failed))


def facts(state: Path) -> dict[str, Any]:
    """What `clocks` and `doctor` say, found without setting anything: the values of ``clocks --json``.

    Raises:
        PowerError: the GPUs cannot be read.
    """
    environ = dict(os.environ)
    devices = open_devices(environ).all()
    left: State | None = None
    unreadable = ""
    try:
        left = state_file.read(state)
    except BadState as error:
        unreadable = str(error)
    if left is not None and left.boot != state_file.boot_id():
        left = None
    changed = {one.uuid: one for one in left.gpus} if left else {}
    found = []
    for device in devices:
        one: dict[str, Any] = {"index": device.index, "uuid": device.uuid, "name": device.name}
        try:
            reading = device.read()
            one |= {"throttle": list(throttle_names(reading.throttle)), "sm_mhz": reading.sm_clock_mhz}
            one |= {"power_limit_w": reading.power_limit_w, "changed": device.uuid in changed}
            clocks = device.supported_sm_clocks()
            one |= {"lowest_mhz": clocks[0], "highest_mhz": clocks[-1], "clocks": len(clocks)}
        except NotSupported:
            pass
        except PowerError as error:
            one["error"] = str(error)
        found.append(one)
    return {
        "backends": [backend.name for backend in candidates(devices, environ)],
        "simulated": any(device.simulated for device in devices),
        "gpus": found,
        "guard": left.pid if left else None,
        "guard_lives": left is not None and Process(left.pid, left.start).runs,
        "unreadable": unreadable,
    }


def run_clocks(args: argparse.Namespace) -> int:
    """What may be set."""
    try:
        found = facts(args.state)
    except PowerError as error:
        print(json.dumps({"error": str(error)}) if args.json else f"error: {error}")
        return 1
    if args.json:
        print(json.dumps(found))
        return 0
    print("clocks may be set by: " + (", ".join(found["backends"]) or "nothing that this user may use"))
    for gpu in found["gpus"]:
        about = f"{gpu['lowest_mhz']} to {gpu['highest_mhz']} MHz" if "lowest_mhz" in gpu else gpu.get("error", "–")
        notes = ", ".join(gpu.get("throttle", [])) or "none"
        changed = "; set by the guard" if gpu.get("changed") else ""
        print(f"GPU {gpu['index']} {gpu['name']}: {about}; now {gpu.get('sm_mhz')} MHz; reasons: {notes}{changed}")
    return 0
