"""`bench --clocks`: energy over the clocks of what runs, of plain engines, and of a single engine at equal clocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_machine import clocks, engines, net, parts, proc
from disagg_machine.bench import plan
from disagg_machine.bench.plan import Setup
from disagg_machine.bench.report import Report, begin
from disagg_machine.bench.setups import Comparison, plain_places, what_runs
from disagg_machine.context import Context
from disagg_machine.engines import SIM, VLLM
from disagg_machine.launch import Plan
from disagg_machine.layout import layout
from disagg_machine.messages import die
from disagg_machine.parts import Part
from disagg_machine.service import need_key
from disagg_machine.settings import Settings

SECONDS = 30
"""Of one run with real GPUs, at least: their energy counter moves each 100 ms, and power is an average over 1 s."""
EQUAL = "equal"
"""End of the names of setups whose GPUs all have the same clock."""


def gpus_of(found: Sequence[Part]) -> dict[str, str]:
    """GPUs by role, of what runs."""
    roles: dict[str, list[str]] = {}
    for part in found:
        if part.alive and part.get("gpus") and part.get("role") in ("prefill", "decode", "plain"):
            roles.setdefault(part.get("role"), []).append(part.get("gpus"))
    return {role: ",".join(dict.fromkeys(",".join(gpus).split(","))) for role, gpus in roles.items()}


def clock_words(settings: Settings, setup: Setup, folder: Path, kind: str, facts: Sequence[tuple[str, str]],
                found: Sequence[Part]) -> list[str]:  # fmt: skip
    """The arguments of ``disagg_report clocks`` for one setup.

    Raises:
        MachineError: 1, it is not known on which GPUs the engines run; 2, fewer than 30 s a run on real GPUs.
    """
    if kind == VLLM and (settings.bench_seconds or SECONDS) < SECONDS:
        raise die(2, "bench_clocks_short", settings.bench_seconds, SECONDS)
    rates = settings.bench_rates.replace(",", " ").split()
    options: dict[str, object] = {
        "--rate": rates[0] if rates else 0,
        "--seconds": settings.bench_seconds or (SECONDS if kind == VLLM else 5),
        "--settle": 2 if kind == VLLM else 0.5,
        "--clocks": settings.bench_clocks,
        "--rounds": settings.bench_rounds,
        "--run-dir": settings.run_dir,
        "--backend": settings.power_backend,
    }
    words = ["clocks", str(folder), *plan.setup_words(settings, setup, options)]
    roles = gpus_of(found)
    if not roles:
        raise die(1, "bench_clocks_gpus")
    for role, gpus in roles.items():
        words += ["--gpus", f"{role}={gpus}"]
    for name, text in facts:
        words += ["--fact", f"{name}={text}"]
    if stat := proc.read_stat(os.getpid()):
        words += ["--owner", f"{os.getpid()}:{stat.start}"]
    words += ["--simulated"] if kind == SIM else []
    words += ["--together"] if setup.name.endswith(EQUAL) else []
    return [*words, "--take-over"] if settings.power_take_over else words


@dataclass(frozen=True, slots=True)
class ClockReport(Report):
    """A report over clocks."""

    runs = "setups/*/run-*.json"

    def measure(self, setup: Setup, key: str) -> None:
        settings = self.context.settings
        found = parts.all_parts(settings.run_dir)
        facts = list(plan.facts_of(settings, self.kind, self.vllm, found).items())
        status = self._run(clock_words(settings, setup, self.folder, self.kind, facts, found), {"BENCH_KEY": key})
        if status:
            raise SystemExit(status)


@dataclass
class ClockComparison(Comparison):
    """What runs, and the engines that it is compared with.

    Attributes:
        traditional: also a single engine, and what runs, with all GPUs at the same clock.
    """

    traditional: bool = False

    @property
    def setups(self) -> int:
        """How many there are; what runs is one or two."""
        return 1 + self.plain + 2 * self.traditional

    def _measure(self) -> None:
        settings = self.context.settings
        # Its clocks would be in the way; `_end` brings them back.
        parts.stop_parts(self.context.run_dir, 30, [clocks.NAME])
        placed = layout(settings)
        setup = plan.pd_setup("pd", "sweep", len(placed.prefills), len(placed.decodes), self.context.url)
        self.report.measure(setup, settings.api_key)
        if self.traditional:
            self.setup += 1
            self.report.measure(
                replace(setup, name=f"pd-{EQUAL}", title=f"{setup.title}, equal clocks"), settings.api_key
            )
        if self.plain:
            self._plain()
        if self.traditional:
            self._single()

    def _single(self) -> None:
        """One engine on the first GPUs of the pool."""
        title = "1 plain engine"
        self._make_room(title)
        places = plain_places(self.context.settings.prefill_http_port, self.pool[:1])
        self._start_plain(places)
        url = "http://" + net.authority(self.context.settings.engine_host, places[0].http)
        setup = Setup(f"single-{EQUAL}", title, "plain", "sweep", 1, 1, (url,))
        self.report.measure(setup, self.context.settings.engine_api_key)

    def _end(self) -> bool:
        good = super()._end()
        if not self.changed and parts.anything_alive(self.context.run_dir):
            placed = layout(self.context.settings)
            clocks.begin(Plan(self.context, self.engines, placed, self.report.python), [])
        return good


def compare(context: Context, plain: bool, traditional: bool) -> int:
    """The exit code.

    Raises:
        MachineError: what keeps it from beginning; nothing is changed then.
    """
    if not (plain or traditional):
        need_key(context)
    before = what_runs(context, ratio=False)
    found = engines.resolve(context)
    pool = plan.pool(context.settings, False, found.kind, ())
    report = begin(context, found.kind, make=ClockReport)
    return ClockComparison(context, report, found, pool, before, False, plain, traditional=traditional).run()
