"""Where the time to the first token goes, from the traces of prefill and decode. Pure.

Only for requests that are alone: the events between a request's start and its first token are its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = (
    ("decode: HTTP and scheduler until WANT", "start", "want"),
    ("prefill: HTTP and scheduler until the step", "start", "open"),
    ("prefill: step enqueued to blocks computed (GO)", "open", "go"),
    ("GO to decode's receiver", "go", "receive"),
    ("the copy", "receive", "received"),
    ("decode: copy done until its scheduler's side knows", "received", "loaded"),
    ("decode: from there to its step", "loaded", "step"),
    ("decode: step to the client's first token", "step", "first"),
)
"""Name, event at its beginning, event at its end. The second runs beside the first one."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a trace; a last line that is cut off is left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def moments(events: Iterable[Mapping[str, Any]], start: float, first: float) -> dict[str, float]:
    """Return when each event of one request happened, in seconds since its start.

    Of several GOs the last counts, since decode waits for it; ``step`` is the first one after the load.
    """
    found: dict[str, float] = {"start": 0.0, "first": first - start}
    for event in sorted(events, key=lambda one: one["time"]):
        name, at = event["event"], event["time"] - start
        if not 0 <= at <= first - start:
            continue
        if name in ("want", "open"):
            found.setdefault(name, at)
        elif name in ("go", "receive", "received", "loaded"):
            found[name] = at
            found.pop("step", None)
        elif name == "step" and event.get("role") == "decode" and "loaded" in found:
            found.setdefault("step", at)
    return found


def durations(found: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds of each stage of which both ends were seen."""
    return {name: (found[end] - found[begin]) * 1000 for name, begin, end in STAGES if begin in found and end in found}


def medians(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each stage over requests, rounded to microseconds."""
    names = [name for name, _, _ in STAGES]
    return {
        name: round(statistics.median(values), 3)
        for name in names
        if (values := [one[name] for one in requests if name in one])
    }
