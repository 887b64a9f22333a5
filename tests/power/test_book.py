"""The energy book: figures per role, token and request, checked by hand; and no figure where one would be wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_power.book import HOST, STALE_SECONDS, EnergyBook, Totals
from disagg_power.report import GpuReport


class Run:
    """Two GPUs that draw a constant power, reported each second, and requests at a constant rate."""

    def __init__(self) -> None:
        self.book = EnergyBook()
        self.now = 1000.0
        self.joules = {"P": 5e6, "D": 7e6}
        self.requests = 0

    def step(self, seconds: int, prefill_w: float, decode_w: float, requests: int = 0, **changes: object) -> None:
        """Each request: 100 prompt tokens computed, 50 output tokens."""
        for _ in range(seconds):
            self.now += 1
            self.requests += requests
            for name, role, watts in (("P", "prefill", prefill_w), ("D", "decode", decode_w)):
                self.joules[name] += watts
                report = GpuReport(name, at=self.now, joules=self.joules[name], power_w=watts, utilization=0.0)
                work = None if requests else self.requests
                self.book.take(role, f"{role}:1", [replace(report, **changes)], self.now, work)  # type: ignore[arg-type]
            self.mark()

    def mark(self) -> None:
        self.book.mark(self.now, Totals(100 * self.requests, 50 * self.requests, self.requests), 5000 + self.now)


def test_an_empty_book_has_no_figures_and_is_false() -> None:
    book = EnergyBook()
    assert not book and book.report(0) is None and book.request_energy(10, 10) is None


def test_joules_per_token_and_request() -> None:
    run = Run()
    run.step(20, 100, 80)
    run.step(1, 600, 480, requests=2)
    run.step(120, 600, 480, requests=2)
    prefill, decode = run.book.figures("prefill"), run.book.figures("decode")
    assert prefill is not None and decode is not None
    assert (prefill.watts, prefill.idle_watts, decode.idle_watts) == (600, 100, 80)
    assert prefill.joules_per_token == pytest.approx(600 / 200) and decode.joules_per_token == pytest.approx(4.8)
    assert prefill.active_joules_per_token == pytest.approx(500 / 200)
    joules, requests, seconds = run.book.per_request()
    assert joules == pytest.approx(1080 / 2) and requests == 240 and seconds == 120
    report = run.book.report(run.now)
    assert report is not None and report["requests_per_wh"] == pytest.approx(3600 / 540, abs=0.01)
    active, idle = run.book.request_energy(100, 50) or (0, 0)
    assert active == pytest.approx(100 * 2.5 + 50 * 4.0) and idle == pytest.approx(100 * 0.5 + 50 * 0.8)
    assert run.book.history(5000 + run.now - 2, 5)["watts"] == {"prefill": 600, "decode": 480}
    assert run.book.history(0, 5) == {name: {"prefill": None, "decode": None} for name in ("watts", "joules_per_token")}


def test_cached_requests_raise_the_energy_per_computed_token() -> None:
    run = Run()
    run.step(30, 600, 480, requests=1)
    run.book.mark(run.now + 1, Totals(100 * run.requests, 50 * run.requests, run.requests))
    assert run.book.request_energy(None, 50) is not None, "a request whose prompt was cached has decode's part"


def test_there_is_no_figure_per_token_before_ten_seconds_or_without_tokens() -> None:
    run = Run()
    run.step(5, 600, 480, requests=1)
    assert run.book.figures("prefill").joules_per_token is None  # type: ignore[union-attr]
    idle = Run()
    idle.step(30, 100, 80)
    figures = idle.book.figures("prefill")
    assert figures is not None and figures.joules_per_token is None and idle.book.per_request()[0] is None


def test_a_counter_that_restarts_counts_neither_back_nor_twice() -> None:
    run = Run()
    run.step(20, 600, 480, requests=1)
    run.joules["P"] = 3.0
    run.step(20, 600, 480, requests=1)
    assert run.book.gpus["P"].joules == pytest.approx(19 * 600 + 19 * 600)


@pytest.mark.parametrize("state", ["lost", "no_figures"])
def test_a_gpu_that_is_gone_leaves_no_figure(state: str) -> None:
    run = Run()
    run.step(30, 600, 480, requests=1)
    run.book.take("prefill", "prefill:1", [GpuReport("P", at=run.now, state=state)], run.now, None)
    run.mark()
    figures = run.book.figures("prefill")
    assert figures is not None and figures.watts is None and figures.joules_per_token is None
    assert run.book.per_request()[0] is None and run.book.request_energy(100, 50) is None
    shown = {gpu["uuid"]: gpu for gpu in run.book.report(run.now)["gpus"]}  # type: ignore[index]
    assert shown["P"]["state"] == state and shown["P"]["watts"] is None and shown["D"]["watts"] == 480


def test_a_gpu_without_reports_is_stale() -> None:
    run = Run()
    run.step(30, 600, 480, requests=1)
    run.now += STALE_SECONDS + 1
    run.mark()
    assert run.book.figures("decode").watts is None  # type: ignore[union-attr]
    assert run.book.report(run.now)["gpus"][0]["state"] == "stale"  # type: ignore[index]


def test_mig_has_power_but_no_figure_per_token() -> None:
    run = Run()
    run.step(30, 600, 480, requests=1, mig=True)
    assert run.book.figures("prefill").joules_per_token is None  # type: ignore[union-attr]
    assert run.book.report(run.now)["gpus"][0]["state"] == "mig"  # type: ignore[index]


def test_a_gpu_of_both_roles_is_not_divided() -> None:
    run = Run()
    for _ in range(30):
        run.now += 1
        run.requests += 1
        run.joules["P"] += 500
        report = GpuReport("P", at=run.now, joules=run.joules["P"], power_w=500)
        run.book.take("prefill", "prefill:1", [report], run.now, None)
        run.book.take("decode", "decode:1", [report], run.now, None)
        run.mark()
    assert run.book.figures("prefill").joules_per_token is None  # type: ignore[union-attr]
    assert run.book.figures("decode").joules_per_token is None  # type: ignore[union-attr]
    assert run.book.per_request()[0] == pytest.approx(500), "counted once"
    assert run.book.report(run.now)["gpus"][0]["shared_with"] == ["decode decode:1"]  # type: ignore[index]


def test_the_host_is_shown_apart() -> None:
    run = Run()
    run.book.take(HOST, "", [GpuReport("cpu-package-0", at=1.0, joules=1.0, power_w=90.0)], run.now, None)
    run.step(30, 600, 480, requests=1)
    assert run.book.per_request()[0] == pytest.approx(1080), "GPUs only"
    assert [gpu["role"] for gpu in run.book.report(run.now)["gpus"]] == ["prefill", "decode", HOST]  # type: ignore[index]
