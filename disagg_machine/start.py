"""Waiting for what was started, and what the last words of one that died mean."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_machine import files, net, parts, proxy_view, ui
from disagg_machine.engines import SIM
from disagg_machine.launch import Plan
from disagg_machine.layout import Place
from disagg_machine.messages import text

LAST_WORDS = (
    ("No available memory for the cache blocks", "hint_memory"),
    ("less than desired GPU memory utilization", "hint_memory"),
    ("CUDA out of memory", "hint_memory"),
    ("ddress already in use", "hint_port"),
    ("is not a valid model identifier", "hint_model"),
    ("Repository Not Found", "hint_model"),
    ("Duplicate GPU detected", "hint_duplicate"),
)
"""Well-known texts in the log of an engine that died, and the message that says what to do."""


def proxy_up(plan: Plan) -> bool:
    """Whether the proxy serves HTTP."""
    answer = proxy_view.get(plan.context.settings, "/livez")
    return answer is not None and answer.ok


def engine_ready(plan: Plan, place: Place) -> bool:
    """Whether an engine answers its /health."""
    answer = net.http_get(net.reach(plan.context.settings.engine_host), place.http, "/health")
    return answer is not None and answer.ok


def pairs_ready(plan: Plan) -> bool:
    """Whether all engines of this layout are ready in the proxy's eyes, not just one pair."""
    _, health = proxy_view.health(plan.context.settings)
    if health is None or health.status != 200:
        return False
    return all(health.ready[role] >= len(plan.layout.of(role)) for role in ("prefill", "decode"))


@dataclass
class Starting:
    """A start of several parts, whose deaths are noticed at once.

    Attributes:
        started: parts of this start, in order.
        since: when it began, in monotonic seconds.
    """

    plan: Plan
    started: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def limit(self) -> int:
        """Seconds for all of it."""
        default = 120 if self.plan.engines.kind == SIM else 1800
        return self.plan.context.settings.start_timeout or default

    def wait(self, ready: Callable[[], bool], name: str, what: str) -> None:
        """Until ``ready``; ``name`` is the part whose log tells why it takes long, ``what`` says what is awaited.

        Raises:
            MachineError: 1, a part died or START_TIMEOUT is over.
        """
        log = self.plan.log(name)
        while True:
            self._check_deaths()
            if ready():
                break
            elapsed = int(time.monotonic() - self.since)
            if elapsed >= self.limit():
                ui.complain("start_timeout", what, self.limit())
                ui.show_log_tail(log, 15)
                raise SystemExit(1)
            ui.progress(what, elapsed, log)
            time.sleep(0.2)
        ui.progress_clear()

    def wait_for_proxy(self) -> None:
        """Until the proxy serves."""
        self.wait(lambda: proxy_up(self.plan), "proxy", text("wait_proxy"))

    def wait_for_engine(self, place: Place, what: str = "") -> None:
        """Until an engine answers."""
        self.wait(lambda: engine_ready(self.plan, place), place.name, what or text("wait_engine", place.name))

    def wait_for_pairs(self) -> None:
        """Until the proxy has admitted all engines."""
        self.wait(lambda: pairs_ready(self.plan), "proxy", text("wait_pairs"))

    def _check_deaths(self) -> None:
        for name in self.started:
            part = parts.load_part(self.plan.context.run_dir, name)
            if part is not None and part.alive:
                continue
            log = self.plan.log(name)
            ui.complain("part_died", name, part.pid if part else "?")
            ui.show_log_tail(log, 20)
            explain(self.plan, name)
            raise SystemExit(1)


def explain(plan: Plan, name: str) -> None:
    """Say what well-known last words in the log of a part mean."""
    end = "\n".join(files.tail(plan.log(name), 200))
    for words, hint in LAST_WORDS:
        if words in end:
            ui.say(hint, *([plan.context.settings.model] if hint == "hint_model" else []))
            return


def wait_for_shared_gpu(starting: Starting, place: Place, earlier: list[Place]) -> None:
    """vLLM measures free memory while it starts: engines on one GPU start one after the other.

    Not where the size of their KV cache is given.
    """
    if starting.plan.engines.kind == SIM or starting.plan.engines.kv_cache_bytes:
        return
    for other in earlier:
        if place.shares_gpu_with(other):
            starting.wait_for_engine(other, text("wait_shared", other.name, place.name))
