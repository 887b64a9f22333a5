"""`proxy`, `prefill [N]`, `decode [N]`: one part in this terminal. Ctrl+C stops it with its children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Sequence

from disagg_machine import engines, gpus, launch, lock, parts, python_environment, signals, ui, up
from disagg_machine import settings as reading
from disagg_machine.compiled import control
from disagg_machine.context import Context
from disagg_machine.engines import Engines
from disagg_machine.layout import Place, layout
from disagg_machine.lock import Lock
from disagg_machine.messages import MachineError, die
from disagg_machine.proxy_view import ProxyView


def cmd_proxy(context: Context, words: Sequence[str]) -> int:
    """``proxy``."""
    return _foreground(context, "proxy", words)


def cmd_prefill(context: Context, words: Sequence[str]) -> int:
    """``prefill [N]``."""
    return _foreground(context, "prefill", words)


def cmd_decode(context: Context, words: Sequence[str]) -> int:
    """``decode [N]``."""
    return _foreground(context, "decode", words)


def _foreground(context: Context, role: str, words: Sequence[str]) -> int:
    """One part until it ends or is stopped.

    Raises:
        MachineError: what keeps it from starting; 1 when it ends with an error.
    """
    number = words[0] if words else ""
    if not re.fullmatch(r"([1-9][0-9]?)?", number, re.ASCII) or len(words) > 1:
        raise die(2, "unknown_argument", role, words[-1])
    reading.need_secrets(context.settings)
    with lock.held(context.settings, role) as held:
        python = python_environment.ensure(context)
        found = engines.resolve(context) if role != "proxy" else _engines_behind(context)
        plan = launch.Plan(context, found, layout(context.settings), python)
        same = plan.layout.of(role)
        if int(number or 1) > len(same):
            raise die(2, "no_such_part", f"{role} {number}", " ".join(plan.layout.names))
        place = same[int(number or 1) - 1]
        running = parts.alive_part(context.run_dir, place.name)
        if running is not None:
            raise die(1, "part_runs", place.name, running.pid)
        if role != "proxy":
            _announce(plan, place, chosen=bool(number))
        plan.check_ports([place])
        if role == "proxy":
            control.need(context, python)
        parts.sweep(context.run_dir, place.name)
        ui.say("foreground", place.name, " ".join(map(str, place.ports)))
        with signals.raised():
            return _run(plan, place, held)


def _engines_behind(context: Context) -> Engines:
    """The engines that a proxy alone will most likely have; it starts without them, too."""
    try:
        return engines.resolve(context)
    except MachineError:
        return Engines(engines.SIM)


def _announce(plan: launch.Plan, place: Place, chosen: bool) -> None:
    context = plan.context
    if plan.engines.simulated:
        up.say_simulated(plan.engines)
    else:
        engines.check_gpus(context.settings, plan.engines, plan.layout, gpus.read_gpus(context.environ))
    if not chosen and place.name == f"{place.role}1":
        ui.say("foreground_first", place.name, place.role)


def _run(plan: launch.Plan, place: Place, held: Lock) -> int:
    """Start it and wait for its end."""
    context, begun = plan.context, False
    try:
        pid = plan.launch(place, None, ProxyView())
        begun = place.role == "proxy" and control.report(context, plan.python)
        held.release()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except signals.Interrupted as ended:
        ui.say("stopping", place.name)
        part = parts.load_part(context.run_dir, place.name)
        with _impatient(part.pid if part else 0):
            parts.stop_parts(context.run_dir, context.settings.stop_timeout, [place.name])
        return ended.code
    finally:
        if begun:
            control.end(context)
    # A part that has exited may have left child processes.
    parts.stop_parts(context.run_dir, 5, [place.name])
    if status:
        # As a shell counts them.
        raise die(1, "part_ended", place.name, status if status > 0 else 128 - status)
    return 0


@contextlib.contextmanager
def _impatient(group: int) -> Iterator[None]:
    """Within, a second Ctrl+C does not wait: it kills the process group. Afterwards nothing interrupts the end."""
    for number in signals.ENDING:
        signal.signal(number, lambda *_: parts.signal_group(signal.SIGKILL, group) if group else None)
    yield
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_IGN)
