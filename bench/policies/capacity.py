"""How much a policy lets the same engines carry: the highest load at which half of the requests still wait little."""

from __future__ import annotations

from dataclasses import replace

from bench.policies.trial import Setup, Trial
from bench.policies.workloads import arrivals

MOST = 0.3
"""Seconds of TTFT that half of the requests may at most need (1 s for bursts, whose prompts are long)."""

RANGES = {
    "chat": (250e3, 800e3), "shared": (150e3, 400e3), "tenants": (300e3, 1200e3),
    "bursts": (60e3, 500e3), "random": (200e3, 400e3), "mixed": (150e3, 700e3),
}  # fmt: skip
_STEPS = 7


def carries(setup: Setup, workload: str, rate: float, seconds: float = 75.0) -> bool:
    """Whether the median TTFT of the second half holds at so many prompt tokens a second."""
    trial = Trial(setup, 1)
    trial.run(arrivals(workload, 1, seconds, rate))
    most = MOST if workload != "bursts" else 1.0
    return trial.figures(seconds / 2)["ttft_p50_ms"] <= most * 1e3


def capacity(task: tuple[Setup, str]) -> tuple[str, str, float]:
    """Prompt tokens a second that are carried, within 2 %; the workload and the policies first."""
    setup, workload = task
    low, high = RANGES[workload]
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if carries(setup, workload, middle) else (low, middle)
    return workload, f"{setup.prefill}/{setup.decode}", low


def setups(base: Setup) -> list[Setup]:
    """Those that are compared."""
    pairs = (("round_robin", "round_robin"), ("least_loaded", "joint"), ("session", "joint"), ("prefix_aware", "joint"))
    return [replace(base, prefill=prefill, decode=decode) for prefill, decode in pairs]
