"""The report of a run, as text and JSON, and the reasons causes it failed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from disagg_sim.chaos import clients
from disagg_sim.chaos.clients import Result

_MAX_EXAMPLES = 5
"""Maximum number of examples per reason."""


@dataclass
class Report:
    """Figures of one run.

    Attributes:
        answers: requests by outcome (:mod:`disagg_sim.chaos.clients`).
        causes: those that were refused, cut, dropped, late or wrong, by cause.
        longest_s: the longest time from sending to an outcome, of clients that did not disconnect.
        unexplained_failures: refused or cut although no fault was active or recent.
        orphans: KV left on a running decode at the end, by id: the explanation, or "" without one.
        orphan_bytes, buffer_bytes: size of that KV, and use of the decodes' buffers.
        stalled, dead: engines stalled at the end, and engines that died; ``stalled_explained``: by an injected fault,
            so that the consequences are no failures either.
        busy: work that did not end.
        afterwards: requests sent after the run, and how many of them had the right response.
        proxy: the proxy's counters.
    """

    command: dict[str, Any]
    planned: int = 0
    sent: int = 0
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    unexplained_failures: list[str] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    prefills_restarted: int = 0
    injected: int = 0
    prefills_repeated: int = 0
    decoded_twice: list[str] = field(default_factory=list)
    orphans: dict[str, str] = field(default_factory=dict)
    orphan_bytes: int = 0
    buffer_bytes: int = 0
    buffer_leaks: list[str] = field(default_factory=list)
    stalled: list[str] = field(default_factory=list)
    stalled_explained: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    not_ready: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    afterwards: tuple[int, int] = (0, 0)
    afterwards_causes: Counter[str] = field(default_factory=Counter)
    tasks: tuple[int, int] = (0, 0)
    rss_mib: tuple[float, float] = (0.0, 0.0)
    proxy: dict[str, Any] = field(default_factory=dict)

    def take(self, results: list[Result]) -> None:
        """Add the clients' results."""
        for result in results:
            self.sent += 1
            self.answers[result.outcome] += 1
            if result.outcome == clients.LEFT:
                continue
            if result.outcome != clients.RIGHT:
                self.causes[f"{result.outcome}: {result.cause[:60]}"] += 1
            if result.outcome in (clients.WRONG, clients.LATE, clients.DROPPED):
                where = f"request {result.number} at {result.begun:.1f} s"
                self.examples.append(f"{where}: {result.outcome}, {result.cause}")
            self.longest_s = max(self.longest_s, result.seconds)

    def reasons(self) -> list[str]:
        """Why the run failed; empty if it passed."""
        found: list[str] = []

        def reason(what: str, items: list[str]) -> None:
            if items:
                more = f" and {len(items) - _MAX_EXAMPLES} more" if len(items) > _MAX_EXAMPLES else ""
                found.append(f"{len(items)} {what}: {'; '.join(items[:_MAX_EXAMPLES])}{more}")

        reason("responses wrong, missing or late", self.examples)
        reason("failures that no injected fault explains", self.unexplained_failures)
        reason("ids decoded twice on one process", self.decoded_twice)
        reason("orphans that no injected fault explains", [key for key, cause in self.orphans.items() if not cause])
        reason("leaks in a decode's count of its KV buffer", self.buffer_leaks)
        reason("engines or listeners died", self.dead)
        reason("engines stalled", self.stalled)
        sent, right = self.afterwards
        if not self.stalled_explained:
            # These are consequences if an injected fault has frozen an engine.
            reason("activities did not end", self.busy)
            reason("instances not ready at the end", self.not_ready)
            if right < sent:
                causes = _counts(self.afterwards_causes)
                found.append(f"only {right} of {sent} requests after the run were right: {causes}")
        if self.sent < self.planned:
            found.append(f"{self.planned - self.sent} of {self.planned} requests have no outcome")
        return found

    def to_json(self) -> str:
        """All figures, and the reasons for failure."""
        figures = {one.name: getattr(self, one.name) for one in fields(self)}
        return json.dumps({**figures, "failed_because": self.reasons()}, indent=2, sort_keys=True)

    def to_text(self) -> str:
        """Text for a terminal."""
        causes = Counter(reason for reason in self.orphans.values())
        explained = sum(count for reason, count in causes.items() if reason)
        sent, right = self.afterwards
        lines = [
            f"requests      {self.sent} in {self.seconds:.0f} s: " + _counts(self.answers),
            *(f"                {count:6} {cause}" for cause, count in self.causes.most_common()),
            f"longest       {self.longest_s:.1f} s to an outcome",
            f"troubles      {_counts(self.troubles)}; {self.prefills_restarted} prefills restarted with a decode; "
            f"{self.injected} requests met a 5xx or reset",
            f"decoded twice {len(self.decoded_twice)}; prefills repeated with the same id: {self.prefills_repeated}",
            f"orphans       {causes['']} unexplained, {explained} explained, {self.orphan_bytes / 1e6:.0f} MB; "
            f"KV buffers count {self.buffer_bytes / 1e6:.0f} MB",
            *(f"                {count:6} {reason}" for reason, count in causes.most_common() if reason),
            f"engines       {len(self.dead)} died, {len(self.stalled)} stalled, "
            f"{len(self.stalled_explained)} stalled or dead by an injected fault",
            f"afterwards    {right} of {sent} right",
            f"proxy         {_counts(Counter(self.proxy))}",
            f"tasks         {self.tasks[0]} before, {self.tasks[1]} after; RSS {self.rss_mib[0]:.0f} MiB before, "
            f"{self.rss_mib[1]:.0f} MiB after (proxy, engines and clients together)",
        ]
        reasons = self.reasons()
        lines.append("result        " + ("failed" if reasons else "every promise kept"))
        return "\n".join([*lines, *(f"  - {reason}" for reason in reasons)])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items())) or "none"
