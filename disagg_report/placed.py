"""Where an elastic proxy has placed requests: counts by way, since its start. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def between(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """The counts of the time in between."""
    return {way: count - before.get(way, 0) for way, count in after.items()}


def shares(placed: Mapping[str, int]) -> str:
    """In words, such as ``split 62%, decode alone 38%``; empty where nothing was placed."""
    total = sum(placed.values())
    parts = [f"{way.replace('_', ' ')} {count / total:.0%}" for way, count in placed.items() if count > 0]
    return ", ".join(parts) if total > 0 else ""
