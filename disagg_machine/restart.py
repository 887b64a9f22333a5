"""`restart`: parts, with the prefills that depend on a decode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from disagg_machine import dependents, launch, lock, parts, proxy_view, ui, up
from disagg_machine import settings as reading
from disagg_machine.compiled import control
from disagg_machine.context import Context
from disagg_machine.launch import Plan
from disagg_machine.messages import die
from disagg_machine.start import Starting


def cmd_restart(context: Context, words: Sequence[str]) -> int:
    """``restart NAME...``: these parts, with the prefills that depend on a decode.

    Raises:
        MachineError: a part is not there, runs in a terminal, or does not start.
    """
    if not words:
        raise die(2, "which_part", "restart")
    reading.need_secrets(context.settings)
    plan = launch.plan(context)
    if "proxy" in words and parts.anything_alive(context.run_dir):
        # Without the lock: the supervisor keeps working during the build.
        control.need(context, plan.python)
    with lock.held(context.settings, "restart"):
        names = _chosen(plan, words)
        _restart(plan, names)
        if "proxy" in names:
            control.report(context, plan.python)
    ui.good("restarted", " ".join(names))
    return 0


def _chosen(plan: Plan, words: Sequence[str]) -> list[str]:
    """The parts that were named, and the prefills that must go with a decode."""
    context = plan.context
    known = {name: parts.load_part(context.run_dir, name) for name in plan.layout.names}
    for name in words:
        if name not in plan.layout:
            raise die(2, "no_such_part", name, " ".join(plan.layout.names))
        part = known[name]
        if part is None and not parts.anything_alive(context.run_dir):
            raise die(3, "not_running", name)
        if part is not None and part.foreground:
            raise die(1, "in_foreground", name)
    names = list(words)
    for name in words:
        if plan.layout[name].role == "decode":
            ask = partial(proxy_view.ask, context.settings)
            more = dependents.paired_prefills(plan.layout, name, known, ask, but=names)
            if more:
                ui.say("restart_prefills", " ".join(more), name)
            names += more
    return names


def _restart(plan: Plan, names: Sequence[str]) -> None:
    context = plan.context
    view = proxy_view.ask(context.settings)
    parts.stop_parts(context.run_dir, context.settings.stop_timeout, names)
    places = [plan.layout[name] for name in names]
    plan.check_ports(places)
    starting = Starting(plan)
    for place in places:
        (context.run_dir / f"{place.name}.restarts").unlink(missing_ok=True)
        up.start_part(starting, place, view)
    for place in places:
        starting.since = time.monotonic()
        if place.role == "proxy":
            starting.wait_for_proxy()
        else:
            starting.wait_for_engine(place)
    if parts.alive_part(context.run_dir, "proxy"):
        starting.since = time.monotonic()
        starting.wait_for_pairs()
