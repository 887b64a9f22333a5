"""`bench` with setups that do not run yet: each is started, measured and stopped, and what ran before comes back.

Each `all` and `stop` is a run of this program, with the settings of this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from disagg_machine import engines, files, gpus, lock, net, parts, ui
from disagg_machine.bench import child, plan
from disagg_machine.bench.plan import Setup
from disagg_machine.bench.report import Report, begin, finish
from disagg_machine.context import Context
from disagg_machine.engines import Engines
from disagg_machine.launch import Plan
from disagg_machine.layout import Layout, Place, layout
from disagg_machine.messages import die
from disagg_machine.proxy_view import ProxyView
from disagg_machine.service import need_key
from disagg_machine.settings import DEFAULT
from disagg_machine.start import Starting


@dataclass(frozen=True, slots=True)
class Before:
    """What ran before: whether anything did, and whether it was supervised."""

    running: bool
    supervised: bool


def what_runs(context: Context, ratio: bool) -> Before:
    """What must come back afterwards.

    Raises:
        MachineError: 1, a part runs in a terminal, or what serves was not started with `all`; 3, nothing serves.
    """
    alive = [part for part in parts.all_parts(context.run_dir) if part.alive]
    for part in alive:
        if part.foreground:
            raise die(1, "in_foreground", part.name)
    if not alive and not ratio:
        need_key(context)
        raise die(1, "bench_not_ours", context.url)
    return Before(bool(alive), any(part.name == "supervisor" for part in alive))


def compare(context: Context, ratio: bool, plain: bool) -> int:
    """Measure every split of the GPUs, or what runs; with ``plain`` also plain engines on the same GPUs.

    Raises:
        MachineError: what keeps it from beginning; nothing is changed then.
    """
    before = what_runs(context, ratio)
    found = engines.resolve(context)
    pool = plan.pool(context.settings, ratio, found.kind, gpus.read_gpus(context.environ) if ratio else ())
    report = begin(context, found.kind)
    return Comparison(context, report, found, pool, before, ratio, plain).run()


@dataclass
class Comparison:
    """Several setups in one report.

    Attributes:
        pool: the GPUs of each engine.
        changed: whether what ran before was stopped.
    """

    context: Context
    report: Report
    engines: Engines
    pool: Sequence[str]
    before: Before
    ratio: bool
    plain: bool
    changed: bool = False
    setup: int = field(init=False)

    def __post_init__(self) -> None:
        # What runs already is the first one.
        self.setup = 0 if self.ratio else 1

    @property
    def setups(self) -> int:
        """How many there are."""
        return (len(self.pool) - 1 + self._elastic_too if self.ratio else 1) + self.plain

    @property
    def _elastic_too(self) -> bool:
        """Whether elastic placement is measured beside the splits: only this project's connector can."""
        return self.ratio and self.engines.own_connector

    def run(self) -> int:
        """Measure all of them; the exit code."""
        return finish(self._measure, self._end)

    def _measure(self) -> None:
        settings = self.context.settings
        if self.ratio:
            for prefills, decodes in plan.splits(self.pool):
                self._split(prefills, decodes)
            if self._elastic_too:
                self._elastic()
        else:
            placed = layout(settings)
            setup = plan.pd_setup("pd", "sweep", len(placed.prefills), len(placed.decodes), self.context.url)
            self.report.measure(setup, settings.api_key)
        if self.plain:
            self._plain()

    def _split(self, prefills: Sequence[str], decodes: Sequence[str]) -> None:
        name = f"p{len(prefills)}d{len(decodes)}"
        setup = plan.pd_setup(name, "ratio", len(prefills), len(decodes), self.context.url)
        self._start_pd(setup, prefills, decodes, {"PLACEMENT": "split"})

    def _elastic(self) -> None:
        """The split in the middle, of which the proxy makes what it wants."""
        settings = self.context.settings
        prefills, decodes = plan.splits(self.pool)[(len(self.pool) - 2) // 2]
        setup = replace(
            plan.pd_setup("elastic", "ratio", len(prefills), len(decodes), self.context.url),
            title=f"Elastic placement on {plan.pd_title(len(prefills), len(decodes))}", kind="elastic",
        )  # fmt: skip
        slo = {"SLO_TTFT_MS": settings.bench_slo_ttft_ms, "SLO_TPOT_MS": settings.bench_slo_tpot_ms}
        self._start_pd(setup, prefills, decodes, {"PLACEMENT": "elastic", **slo})

    def _start_pd(self, setup: Setup, prefills: Sequence[str], decodes: Sequence[str], more: Mapping[str, str]) -> None:
        self._make_room(setup.title)
        gpus_of = {"PREFILL_GPUS": ",".join(prefills), "DECODE_GPUS": ",".join(decodes)}
        self._again("all", "--no-supervise", **gpus_of, **more)
        self.report.measure(setup, self.context.settings.api_key)

    def _plain(self) -> None:
        """An engine on each entry of the pool, without proxy and KV transfer."""
        count = len(self.pool)
        title = f"{count} plain engines"
        self._make_room(title)
        places = plain_places(self.context.settings.prefill_http_port, self.pool)
        self._start_plain(places)
        urls = ["http://" + net.authority(self.context.settings.engine_host, place.http) for place in places]
        question = "ratio" if self.ratio else "sweep"
        setup = Setup("plain", title, "plain", question, count, count, urls)
        self.report.measure(setup, self.context.settings.engine_api_key)

    def _start_plain(self, places: Sequence[Place]) -> None:
        started = Starting(Plan(self.context, self.engines, Layout(tuple(places)), self.report.python))
        with lock.held(self.context.settings, "bench"):
            started.plan.check_ports(places)
            for place in places:
                log = started.plan.log(place.name)
                files.rotate(log)
                started.started.append(place.name)
                started.plan.launch(place, log, ProxyView())
            for place in places:
                started.wait_for_engine(place)

    def _make_room(self, title: str) -> None:
        """What runs makes room for another setup."""
        self.setup += 1
        ui.say("bench_setup", title, self.setup, self.setups)
        self.changed = True
        self._again("stop")

    def _end(self) -> bool:
        """The summary, then what ran before. Another Ctrl+C leaves everything stopped."""
        good = self.report.write()
        if not self.changed:
            return good
        good = self._run("stop") == 0 and good
        if self.before.running:
            ui.say("bench_restoring")
            good = self._run("all", "--supervise" if self.before.supervised else "--no-supervise") == 0 and good
        return good

    def _again(self, *words: str, **changes: str) -> None:
        """This program once more.

        Raises:
            SystemExit: it failed; with its exit code.
        """
        status = self._run(*words, **changes)
        if status:
            raise SystemExit(status)

    def _run(self, *words: str, **changes: str) -> int:
        """This program once more, with this one's settings and ``changes`` on top; its exit code."""
        settings = self.context.settings
        chosen = {name: value for name, value in settings.texts.items() if value and settings.sources[name] != DEFAULT}
        return child.run(
            [*self.context.program(), f"--script={self.context.script}", *words],
            {**self.context.environ, **chosen, "BENCH_CHILD": "1", **changes},
            apart=True,
        )


def plain_places(first_port: int, pool: Sequence[str]) -> list[Place]:
    """A plain engine on each entry of the pool; their ports are counted up from that of the first prefill."""
    return [
        Place(f"plain{number + 1}", "plain", first_port + number, None, tuple(gpus.split("+")))
        for number, gpus in enumerate(pool)
    ]
