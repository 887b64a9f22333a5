"""`doctor`: every line ok, a warning or an error, with its remedy. It changes nothing.

Each check is a function that looks at a :class:`~disagg_machine.doctor.machine.Machine`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

from disagg_machine import ui
from disagg_machine.context import Context
from disagg_machine.doctor import clocks, hardware, running, software
from disagg_machine.doctor.machine import Machine
from disagg_machine.doctor.verdict import Level, Verdict
from disagg_machine.messages import die, text

Check = Callable[[Machine], Iterable[Verdict]]

CHECKS: tuple[Check, ...] = (
    software.check_python,
    software.check_compiled,
    software.check_vllm,
    hardware.check_gpus,
    hardware.check_gpu_memory,
    hardware.check_links,
    clocks.check_clocks,
    running.check_ports,
    software.check_model,
    hardware.check_pinned_memory,
    hardware.check_disk,
    hardware.check_limits,
    running.check_run_dir,
    running.check_running,
)

_COLOURS = {Level.OK: ui.GREEN, Level.WARNING: ui.YELLOW, Level.ERROR: ui.RED}


def cmd_doctor(context: Context, words: Sequence[str]) -> int:
    """The command; exit code 1 when there is an error."""
    if words:
        raise die(2, "unknown_argument", "doctor", words[0])
    return run(Machine(context))


def run(machine: Machine, checks: Iterable[Check] = CHECKS) -> int:
    """Print what each check says, as soon as it says it."""
    counts = dict.fromkeys(Level, 0)
    for check in checks:
        for verdict in check(machine):
            counts[verdict.level] += 1
            ui.out(line(verdict))
    if counts[Level.ERROR]:
        ui.complain("doctor_bad", counts[Level.ERROR], counts[Level.WARNING])
        return 1
    ui.good("doctor_good", counts[Level.WARNING])
    return 0


def line(verdict: Verdict) -> str:
    """A verdict as it is printed."""
    level = ui.coloured(f"[{text(f'doctor_{verdict.level.value}')}]", _COLOURS[verdict.level], stream=sys.stdout)
    return f"{level} {text(verdict.key, *verdict.arguments)}"
