"""How transfers end, as counters: names, reasons and their sums over steps and ranks. Pure, also for the simulator."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

LOADED = "disagg_kv_loaded_prompts"
RECOMPUTED = "disagg_kv_recomputed_prompts"
UNFETCHED = "disagg_kv_unfetched_prompts"
HELP = {
    LOADED: "Prompts whose KV was loaded from a prefill engine.",
    RECOMPUTED: "Prompts computed here because their KV was not received, by reason.",
    UNFETCHED: "Prompts whose KV was computed here but never fetched, by reason.",
}
"""Counters by name, without the prefix ``vllm:``. Each tensor parallel rank counts its own transfers."""

_REASONS = (
    ("refused: ", "refused"),
    ("not received in time", "timeout"),
    ("liveness probes", "no_answer"),
    ("released", "released"),
    ("expired", "expired"),
    ("too much KV waits", "overload"),
    ("too many requests wait", "overload"),
    ("adapter", "adapter"),
    ("weights were updated", "weights_updated"),
    ("blocks, not", "mismatch"),
    ("aborted", "aborted"),
    ("not computed", "aborted"),
    ("wanted twice", "duplicate"),
    ("the same KV is being loaded", "duplicate"),
    ("replaced", "duplicate"),
    ("connect", "connection"),
    ("closed", "connection"),
    ("decode is gone", "connection"),
)
"""Text in a reason, label of the counter; the first that fits."""
_EXCEPTION = re.compile(r"\w+(Error|Timeout|Stalled|Closed): ")
LABELS = {
    RECOMPUTED: tuple(dict.fromkeys([label for _, label in _REASONS] + ["other"])),
    UNFETCHED: ("expired", "overload", "other"),
}
"""All values of the label ``reason``."""


def reason_label(reason: str) -> str:
    """Return the label of a reason. Reasons have parts that peers choose; labels must stay few."""
    for text, label in _REASONS:
        if text in reason:
            return label
    return "connection" if _EXCEPTION.match(reason) else "other"


class Outcomes:
    """Counts since ``take``: a plain dictionary of numbers, as vLLM sends it from workers to its metrics."""

    def __init__(self) -> None:
        self._counts: dict[str, Any] = {}

    def loaded(self, count: int) -> None:
        if count:
            add(self._counts, {LOADED: count})

    def ended(self, name: str, reasons: Iterable[str]) -> None:
        """Count prompts that were recomputed or not fetched, one per reason."""
        labels = (reason_label(reason) for reason in reasons)
        if counts := Counter(label if label in LABELS[name] else "other" for label in labels):
            add(self._counts, {name: counts})

    def take(self) -> dict[str, Any]:
        """Return the counts since the last call; empty if there are none."""
        found, self._counts = self._counts, {}
        return found


def add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add counts of ``Outcomes.take`` to others."""
    for name, value in more.items():
        if isinstance(value, dict):
            total[name] = dict(Counter(total.get(name, {})) + Counter(value))
        else:
            total[name] = total.get(name, 0) + value
