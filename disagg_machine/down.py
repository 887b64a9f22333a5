"""`stop`: by PID files and /proc alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from disagg_machine import clocks, lock, parts, proc, ui
from disagg_machine.compiled import build, control
from disagg_machine.context import Context
from disagg_machine.messages import die


def cmd_stop(context: Context, words: Sequence[str]) -> int:
    """``stop [NAME...]``: everything, or the parts that are named.

    Raises:
        MachineError: 3, a named part does not run.
    """
    if not words or words[0] == "all":
        stop_everything(context)
        return 0
    with lock.held(context.settings, "stop"):
        for name in words:
            part = parts.load_part(context.run_dir, name) if "/" not in name else None
            if part is None:
                raise die(3, "not_running", name)
            if part.get("role") == "decode" and not part.own_connector:
                ui.say("stopped_decode", name)
        parts.stop_parts(context.run_dir, context.settings.stop_timeout, words)
    ui.good("stopped", " ".join(words))
    return 0


def stop_everything(context: Context) -> None:
    """Stop all parts, and reset clocks that a killed guard has left.

    The supervisor goes first, or it would start again what is being stopped, and the clocks with it; then the proxy, so
    that requests in flight still have their engines; then all engines at once. A build of the hot path ends too; the
    next start begins it anew.
    """
    run_dir, seconds = context.run_dir, context.settings.stop_timeout
    interrupt_all(context)
    build_ended = control.end(context)
    if not parts.known_parts(run_dir):
        clocks.undo(context)
        if build_ended:
            ui.good("stopped", build.PART)
        else:
            ui.say("nothing_runs")
        return
    parts.stop_parts(run_dir, 30, parts.HELPERS)
    clocks.undo(context)
    with lock.held(context.settings, "stop"):
        names = parts.known_parts(run_dir)
        # A `restart` may have begun one in the meantime.
        control.end(context)
        parts.stop_parts(run_dir, seconds, ["proxy"])
        parts.stop_parts(run_dir, seconds, [name for name in names if name != "proxy"])
        (run_dir / "settings").unlink(missing_ok=True)
        for path in run_dir.glob("*.restarts"):
            path.unlink(missing_ok=True)
    ui.good("stopped", " ".join(names))


def interrupt_all(context: Context) -> None:
    """Notify an `all` that still starts: it stops what it started."""
    holder = lock.holder(context.run_dir)
    if holder is None or holder.command != "all":
        return
    ui.say("interrupting_all", holder.pid)
    stat = proc.read_stat(holder.pid)
    deadline = time.monotonic() + context.settings.stop_timeout + 15
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except OSError:
        return
    while stat is not None and proc.runs(holder.pid, stat.start) and time.monotonic() < deadline:
        time.sleep(0.05)
