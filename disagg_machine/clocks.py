"""The part ``power``: holds each role's clocks while what runs is supervised, or runs. It is disagg_power's, a process.

Clocks that a killed guard has left stand in ``RUN_DIR/power.state``; `all` and `stop` reset them first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_machine import files, launch, net, parts, ui
from disagg_machine.commands import POWER_STATUS, clocks_wanted
from disagg_machine.context import Context
from disagg_machine.launch import Plan
from disagg_machine.layout import Layout
from disagg_machine.messages import text
from disagg_machine.parts import Part
from disagg_machine.settings import Settings

NAME = "power"
STATE, STATUS = "power.state", POWER_STATUS
"""Files in RUN_DIR that disagg_power writes: what to reset, and what is set."""
START_SECONDS = 40.0
"""Until the guard has set what it can set."""
PROGRAM_SECONDS = 60.0
"""For a program that looks or resets."""


def gpus_of(layout: Layout, role: str) -> str:
    """The GPUs of a role, separated by commas."""
    return ",".join(dict.fromkeys(gpu for place in layout.of(role) for gpu in place.gpus))


def holder_words(settings: Settings, layout: Layout, python: str, owners: Sequence[Part]) -> list[str]:
    """The command line of the holder; it ends when none of the owners runs any more."""
    words = [python, "-m", "disagg_power", "hold", "--run-dir", str(settings.run_dir)]
    words += ["--backend", settings.power_backend]
    for role in ("prefill", "decode"):
        options = {
            "gpus": gpus_of(layout, role),
            "sm": getattr(settings, f"{role}_sm_clock"),
            "memory": getattr(settings, f"{role}_mem_clock"),
            "power": getattr(settings, f"{role}_power_limit") or "",
        }
        for name, value in options.items():
            if value:
                words += [f"--{role}-{name}", str(value)]
    if settings.power_governor != "off":
        address = net.authority(settings.http_proxy_host, settings.http_proxy_port)
        words += ["--governor", settings.power_governor, "--metrics", f"http://{address}/metrics"]
        words += ["--slo-ttft-ms", settings.bench_slo_ttft_ms, "--slo-tpot-ms", settings.bench_slo_tpot_ms]
    for owner in owners:
        words += ["--owner", f"{owner.pid}:{owner.get('start')}"]
    if settings.power_take_over:
        words.append("--take-over")
    return words


def begin(plan: Plan, started: list[str]) -> None:
    """Set the clocks of these settings. What cannot be set is one line; everything else works without."""
    context = plan.context
    settings = context.settings
    if not clocks_wanted(settings):
        return
    supervisor = parts.alive_part(context.run_dir, "supervisor")
    owners = [supervisor] if supervisor else [part for part in parts.all_parts(context.run_dir) if part.alive]
    status = context.run_dir / STATUS
    status.unlink(missing_ok=True)
    log = plan.log(NAME)
    files.rotate(log)
    started.append(NAME)
    environment = context.child_environment() | {"PYTHONUNBUFFERED": "1"} | launch.without_internet_proxy(context)
    fields = {"kind": "clocks", "role": NAME, "mode": "background"}
    words = holder_words(settings, plan.layout, plan.python, owners)
    pid = parts.spawn(words, environment, context.run_dir / f"{NAME}.pid", fields, folder=context.root, log=log)
    plan.children.add(pid)
    deadline = time.monotonic() + START_SECONDS
    while not (found := _json(status)) and parts.alive_part(context.run_dir, NAME) and time.monotonic() < deadline:
        time.sleep(0.05)
    if found.get("state") == "set":
        ui.say("power_set", describe(found) if settings.power_governor == "off" else "POWER_GOVERNOR=slo")
        for note in found.get("notes", []):
            ui.warn("power_note", note)
        return
    ui.warn("power_not_set", found.get("why") or text("power_see_log", log))
    parts.stop_parts(context.run_dir, 10, [NAME])
    started.remove(NAME)


def describe(status: dict[str, Any]) -> str:
    """What is set, by role."""
    clocks = status.get("clocks_mhz") or {}
    return ", ".join(f"{role} {mhz} MHz" if mhz else role for role, mhz in clocks.items())


def undo(context: Context) -> bool:
    """Reset what a killed guard has left; False, after a line that says why, when that failed."""
    (context.run_dir / STATUS).unlink(missing_ok=True)
    state = context.run_dir / STATE
    if not state.is_file():
        return True
    # The Python of the guard, which can read the GPUs.
    python = str(_json(state).get("python") or sys.executable)
    words = [python, "-m", "disagg_power", "reset", "--state", str(state)]
    code, out, err = run(words, context)
    if code:
        ui.complain("power_left", err.strip() or out.strip() or code)
        return False
    for line in out.splitlines():
        ui.say("power_reset", line)
    return True


def look(context: Context, python: str) -> dict[str, Any]:
    """What `power clocks --json` says; ``error`` when it cannot. It sets nothing."""
    state = str(context.run_dir / STATE)
    _, out, err = run([python, "-m", "disagg_power", "clocks", "--json", "--state", state], context)
    try:
        found = json.loads(out)
    except ValueError:
        return {"error": (err.strip().splitlines() or [python])[-1]}
    return found if isinstance(found, dict) else {"error": out}


def run(words: Sequence[str], context: Context) -> tuple[int, str, str]:
    """A program to its end: exit code, stdout and stderr."""
    try:
        done = subprocess.run(
            words, cwd=context.root, env=context.child_environment(), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=PROGRAM_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
