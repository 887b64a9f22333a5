"""A book with every figure."""

from __future__ import annotations

from disagg_power.book import ROLES, EnergyBook, Totals
from disagg_power.report import GpuReport


def count_energy(book: EnergyBook, now: float) -> None:
    """A minute of one GPU for each role, at 100 W, 100 prompt tokens and 50 output tokens a second."""
    for second in range(61):
        at = now - 60 + second
        for role in ROLES:
            report = GpuReport(f"GPU-{role}", at, 100.0 * second, "counter", 100.0, 1980, 3201, 0.0, 40.0)
            book.take(role, f"{role}:1", [report], at, 0)
        book.mark(at, Totals(100 * second, 50 * second, second))
