"""One report: its folder, the measurements of disagg_report, and the summary, however they ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from disagg_machine import parts, python_environment, signals, ui, vllm_facts
from disagg_machine.bench import child, plan
from disagg_machine.bench.plan import Setup
from disagg_machine.context import Context
from disagg_machine.engines import SIM, VLLM
from disagg_machine.messages import MachineError, die, text
from disagg_machine.vllm_facts import VllmFacts


def running_kind(run_dir: Path) -> str:
    """``vllm`` when vLLM's engines run here, else ``sim``."""
    return VLLM if any(part.get("kind") == VLLM for part in parts.all_parts(run_dir)) else SIM


@dataclass(frozen=True, slots=True)
class Report:
    """A report that is being made.

    Attributes:
        python: the Python that has disagg_report.
        kind: ``vllm`` or ``sim``: what is measured.
        vllm: the vLLM whose load generator may be used.
        client: the load generator.
    """

    context: Context
    python: str
    kind: str
    vllm: VllmFacts | None
    client: str
    folder: Path

    runs: ClassVar[str] = "setups/*/rate-*.json"
    """The files of what was measured."""

    def measure(self, setup: Setup, key: str) -> None:
        """One setup into the report.

        Args:
            key: of what is measured. It goes through the environment, where `ps` of other users does not show it.

        Raises:
            SystemExit: it failed, or was interrupted; with its exit code.
        """
        settings = self.context.settings
        found = parts.all_parts(settings.run_dir)
        words = plan.sweep_words(settings, setup, self.folder, self.kind, self.vllm, self.client, found)
        status = self._run(words, {"BENCH_KEY": key})
        if status:
            raise SystemExit(status)

    def write(self) -> bool:
        """The summary of what was measured; False when there is nothing, or it cannot be written."""
        if not any(self.folder.glob(self.runs)):
            ui.complain("bench_nothing", self.folder)
            return False
        return self._run(["write", str(self.folder)], {}) == 0

    def _run(self, words: Sequence[str], environment: dict[str, str]) -> int:
        program = [self.python, "-m", "disagg_report", *words]
        return child.run(program, {**self.context.environ, **environment}, self.context.root)


def begin(context: Context, kind: str, now: float | None = None, make: type[Report] | None = None) -> Report:
    """A new folder, and the Python and the load generator for it.

    Args:
        kind: ``vllm`` or ``sim``: what will be measured.
        make: the class of the report; None for one over request rates.

    Raises:
        MachineError: 1 or 2; settings that contradict each other, or a program that is missing.
    """
    settings = context.settings
    python = python_environment.ensure(context)
    if settings.bench_input_len + settings.bench_output_len > settings.max_model_len:
        raise die(2, "bench_too_long", settings.bench_input_len, settings.bench_output_len, settings.max_model_len)
    needed = kind == VLLM or settings.bench_client == plan.VLLM_CLIENT
    facts = vllm_facts.find_vllm(context) if needed else None
    client = plan.client(settings, kind, facts)
    if kind == SIM:
        ui.loud(text("bench_sim_figures"))
    elif client == plan.OWN_CLIENT:
        ui.warn("bench_own_client")
    folder = settings.report_dir / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise die(1, "cannot_make_dir", folder) from None
    ui.say("bench_folder", folder)
    return (make or Report)(context, python, kind, facts, client, folder)


def finish(work: Callable[[], None], end: Callable[[], bool]) -> int:
    """Do the work, and then the end, however the work ended: by an error, a failed program, or a signal.

    Args:
        end: writes the summary and brings back what ran; False when a part of it failed. A further Ctrl+C ends it.

    Returns:
        The exit code.
    """
    status, good = 1, False
    try:
        with signals.raised():
            work()
        status = 0
    except MachineError as error:
        ui.complain(error.key, *error.arguments)
        status = error.code
    except signals.Interrupted as ended:
        status = ended.code
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        # Also after an error that nobody expects.
        ui.progress_clear()
        good = end()
    return status if good else status or 1
