"""`status` and `logs`: looking without changing anything, by PID files, /proc and small HTTP questions alone."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from disagg_machine import files, gpus, parts, proxy_view, signals, ui
from disagg_machine.compiled import control
from disagg_machine.compiled.control import State
from disagg_machine.context import Context
from disagg_machine.messages import die, text
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView
from disagg_machine.readiness import FROZEN, HUNG, LOADING, Readiness, pair_is_missing, readiness

_ROW = "{:<12} {:<10} {:<8} {:<13} {:<9} {:<9} {}"
_INDENT = " " * 13


def cmd_status(context: Context, words: Sequence[str]) -> int:
    """Each process, its ports, readiness and restarts, and the memory of the GPUs.

    Returns:
        0 when all is well, 1 when something is down, frozen or hung, 3 when nothing runs.
    """
    found = parts.all_parts(context.run_dir)
    if not found:
        ui.say("nothing_runs")
        return 3
    known = {part.name: part for part in found}
    view = proxy_view.ask(context.settings) if "proxy" in known else ProxyView()
    supervised = "supervisor" in known and known["supervisor"].alive
    ui.out(_ROW.format("NAME", "KIND", "PID", "PORTS", "STATE", "UPTIME", "READY"))
    worst, loading, missing = 0, False, ""
    for part in found:
        judged = readiness(context, part, view) if part.alive else None
        state = _state(context, part, judged)
        worst = max(worst, int(not part.alive or state in (HUNG, FROZEN)))
        if judged is not None:
            loading = loading or judged.health == LOADING
            missing = judged.missing or missing
        kind = "SIMULATED" if part.get("kind") == "sim" else part.get("kind", "?")
        ready = judged.words if judged else "-"
        ui.out(_ROW.format(part.name, kind, part.get("pid"), _ports(part), state, _uptime(part), ready))
        if part.get("role") == "proxy" and part.alive:
            _show_compiled(context, part, view)
        _show_remedy(part, state, view, supervised)
        _show_restarts(context, part)
    if pair_is_missing(context, missing, loading):
        worst = 1
        ui.complain("status_no_pair", missing)
    if view.refused:
        ui.warn(proxy_view.key_problem(context.settings), context.url)
    if any(part.get("kind") == "sim" for part in found):
        ui.warn("status_sim")
    for gpu in gpus.read_gpus(context.environ):
        ui.out(f"GPU {gpu.index}  {gpu.name}  {gpu.total_mib - gpu.free_mib} / {gpu.total_mib} MiB")
    return worst


def restarts(context: Context, name: str) -> dict[str, str]:
    """What the supervisor noted of a part: count, state, at, reason; empty when it has never restarted it."""
    return files.read_fields(context.run_dir / f"{name}.restarts")


def _state(context: Context, part: Part, judged: Readiness | None) -> str:
    if judged is not None:
        return judged.health if judged.health in (HUNG, FROZEN) else part.state
    if restarts(context, part.name).get("state") == "given-up":
        return "given-up"
    return "waiting" if part.get("pid") == "0" else parts.DEAD


def _ports(part: Part) -> str:
    return ",".join(filter(None, [part.get("http"), part.get("kv")])) or "-"


def _uptime(part: Part) -> str:
    if not part.alive:
        return "-"
    now = int(time.time())
    minutes, seconds = divmod(now - part.number("since", now), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _show_remedy(part: Part, state: str, view: ProxyView, supervised: bool) -> None:
    """What to do about an engine that must be restarted, where no supervisor does it."""
    if not part.alive or not (state == HUNG or view.wanted(part.number("http"))):
        return
    if part.foreground:
        ui.out(_INDENT + text("status_wanted_terminal"))
    elif not supervised:
        ui.out(_INDENT + text("status_wanted", part.name))


def _show_compiled(context: Context, part: Part, view: ProxyView) -> None:
    """Whether the proxy that runs is compiled, and where it is not, what there is to know of the build."""
    if view.compiled is None:
        return
    if view.compiled:
        ui.out(_INDENT + text("status_compiled"))
        return
    found = control.look(context, part.get("python")) if part.get("python") else control.Look(State.OFF)
    more = {
        State.READY: lambda: text("compiled_ready", context.script),
        State.RUNNING: lambda: text("compiled_later", found.log, context.script),
        State.FAILED: lambda: text("compiled_failed", found.log),
        State.BLOCKED: lambda: text("compiled_blocked", found.obstacle_text),
    }.get(found.state)
    ui.out(_INDENT + (more() if more else text("status_interpreted")))


def _show_restarts(context: Context, part: Part) -> None:
    noted = restarts(context, part.name)
    if not noted:
        return
    at = time.strftime("%H:%M:%S", time.localtime(int(noted.get("at") or 0)))
    ui.out(_INDENT + text("status_restarts", noted.get("count", "0"), at, noted.get("reason", "")))
    if noted.get("state") == "given-up":
        ui.out(_INDENT + text("status_given_up", context.settings.log(part.name)))


def cmd_logs(context: Context, words: Sequence[str]) -> int:
    """``logs [NAME...] [-f] [-n LINES]``: becomes ``tail``.

    Raises:
        MachineError: 2, wrong usage; 3, there is no such log.
    """
    follow, lines, names = False, "40", []
    rest = iter(words)
    for word in rest:
        if word in ("-f", "--follow"):
            follow = True
        elif word == "-n":
            lines = next(rest, "")
            if not (lines.isascii() and lines.isdigit()):
                raise die(2, "unknown_argument", "logs -n", lines)
        elif word.startswith("-"):
            raise die(2, "unknown_argument", "logs", word)
        else:
            names.append(word)
    found = [str(path) for path in _logs(context.settings.log_dir, names)]
    options = ["-n", lines, "-F"] if follow else ["-n", lines] if len(found) == 1 else ["-v", "-n", lines]
    signals.restore_sigpipe()
    os.execvp("tail", ["tail", *options, "--", *found])


def _logs(folder: Path, names: Sequence[str]) -> list[Path]:
    """The logs of these names, or all of them."""
    if not names:
        found = sorted(path for path in folder.glob("*.log") if path.is_file())
        if not found:
            raise die(3, "no_logs", folder)
        return found
    for name in names:
        if "/" in name or not (folder / f"{name.removesuffix('.log')}.log").is_file():
            raise die(3, "no_log", name, folder)
    return [folder / f"{name.removesuffix('.log')}.log" for name in names]
