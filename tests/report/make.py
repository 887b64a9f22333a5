"""Requests, measurements and reports for these tests."""

from __future__ import annotations

from pathlib import Path

from disagg_report.folder import Header, Setup, setup_folder, write_header, write_rate, write_setup
from disagg_report.records import Measurement, Power, Shot
from disagg_report.slo import Slo

SLO = Slo(ttft_ms=100.0, tpot_ms=20.0, attainment=0.9)


def shot(ttft: float = 50.0, tpot: float = 10.0, tokens: int = 5, sent: float = 0.0, **more: object) -> Shot:
    """An answered request whose tokens come evenly."""
    fields: dict[str, object] = {
        "sent": sent,
        "ttft_ms": ttft,
        "itl_ms": (tpot,) * (tokens - 1),
        "latency_ms": ttft + tpot * (tokens - 1),
        "prompt_tokens": 8,
        "output_tokens": tokens,
        "late_ms": 0.1,
    }
    return Shot(**{**fields, **more})  # type: ignore[arg-type]


def measured(rate: float, good: int, bad: int = 0, **more: object) -> Measurement:
    """So many requests within the SLO, and so many that were too late."""
    shots = (*(shot() for _ in range(good)), *(shot(ttft=500.0) for _ in range(bad)))
    return Measurement(rate, (good + bad) / rate + 0.1, shots, **more)  # type: ignore[arg-type]


def header(question: str = "sweep", simulated: bool = False) -> Header:
    return Header("2026-01-02T03:04:05+00:00", question, SLO, 8, 5, 10.0, 7, simulated, {"vLLM": "0.26.0"})


def setup(name: str, title: str, **more: object) -> Setup:
    fields: dict[str, object] = {
        "kind": "pd", "client": "vllm bench serve 0.26.0", "urls": ("http://127.0.0.1:1",), "engines": 2,
        "ended": "the limit was found",
    }  # fmt: skip
    return Setup(name, title, **{**fields, **more})  # type: ignore[arg-type]


def written(
    folder: Path, setups: dict[str, list[Measurement]], question: str = "sweep", simulated: bool = False
) -> Path:
    """A report on disk: measurements by the setup's title."""
    write_header(folder, header(question, simulated))
    for number, (title, rates) in enumerate(setups.items()):
        place = setup_folder(folder, f"s{number}")
        write_setup(place, setup(f"s{number}", title))
        for one in rates:
            write_rate(place, one)
    return folder


POWER = {"prefill": Power(("0",), 400.0, 4000.0, 10.0), "decode": Power(("1",), 300.0, 3000.0, 10.0)}
