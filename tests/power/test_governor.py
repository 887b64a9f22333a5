"""The governor's law over a modelled decode and prefill in virtual time: the SLO holds through a step load, and most of
what the model allows is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from disagg_power.governor import (
    DWELL,
    NO_DATA,
    SLO_MISSED,
    DecodeLaw,
    Governor,
    PrefillLaw,
    Sample,
    steps,
)
from disagg_power.simulated import GpuModel, best_clock

MODEL = GpuModel()
TICK = 0.5
SLO_GAP, SLO_TTFT = 0.050, 1.0


def clocks(phase: str) -> tuple[int, ...]:
    return steps(MODEL.clocks(), best_clock(MODEL, "prefill" if phase == "prefill" else "decode"))


@dataclass
class Account:
    """What a run of the model has cost.

    Attributes:
        misses: windows with the SLO missed.
    """

    joules: float = 0.0
    windows: int = 0
    misses: int = 0


def load_at(now: float) -> float:
    """Quiet, a step to nearly twice the load, quiet again: a quarter of an hour."""
    return 0.55 if now < 300 or now >= 600 else 1.0


def gap_of(clock: int, load: float) -> float:
    """Seconds between two tokens: at the top 22 ms when quiet and 40 ms in the step."""
    return 0.040 * load / MODEL.pace(clock, "decode")


def ttft_of(clock: int, load: float) -> float:
    """At the top 385 ms when quiet, 700 ms in the step."""
    return 0.7 * load / MODEL.pace(clock, "prefill")


def decode_run(choose: Callable[[float, float], int]) -> Account:
    """Decode at full load of its GPU; ``choose`` gets the time and the gap of the last window."""
    account, now, gap = Account(), 0.0, gap_of(1980, load_at(0))
    while now < 900:
        clock = choose(now, gap)
        gap = gap_of(clock, load_at(now))
        account.joules += MODEL.power(clock, 1.0) * TICK
        account.windows += 1
        account.misses += gap > SLO_GAP
        now += TICK
    return account


def oracle(now: float, phase: str) -> int:
    """The lowest clock that keeps the SLO at this load, not below the floor."""
    of, slo = (gap_of, SLO_GAP) if phase == "decode" else (ttft_of, SLO_TTFT)
    return next(clock for clock in clocks(phase) if of(clock, load_at(now)) <= slo or clock == 1980)


def test_decode_keeps_the_slo_through_a_step_and_saves_most_of_what_is_possible() -> None:
    law = DecodeLaw(clocks("decode"), SLO_GAP)
    governed = decode_run(lambda now, gap: law.next(Sample(now, gap_s=gap)))
    top, best = decode_run(lambda now, gap: 1980), decode_run(lambda now, gap: oracle(now, "decode"))
    assert best.misses == 0 and top.misses == 0
    assert governed.misses <= 2, "the window in which the load steps up, and the one that shows it"
    assert (top.joules - governed.joules) >= 0.8 * (top.joules - best.joules) > 0


def prefill_run(choose: Callable[[float, float], int]) -> Account:
    """The same for prefill, whose GPU works as long as its prompts take, and is idle for the rest of a window."""
    account, now, ttft = Account(), 0.0, ttft_of(1980, load_at(0))
    while now < 900:
        clock = choose(now, ttft)
        ttft = ttft_of(clock, load_at(now))
        busy = min(1.0, ttft)
        account.joules += (MODEL.power(clock, 1.0) * busy + MODEL.power(345, 0.0) * (1 - busy)) * TICK
        account.windows += 1
        account.misses += ttft > SLO_TTFT
        now += TICK
    return account


def test_prefill_takes_the_lowest_clock_that_fits_the_budget() -> None:
    law = PrefillLaw(clocks("prefill"), SLO_TTFT)
    governed = prefill_run(lambda now, ttft: law.next(Sample(now, ttft_s=ttft, prompts=1)))
    top, best = prefill_run(lambda now, ttft: 1980), prefill_run(lambda now, ttft: oracle(now, "prefill"))
    assert top.misses == best.misses == 0 and governed.misses <= 2
    assert (top.joules - governed.joules) >= 0.8 * (top.joules - best.joules) > 0


# -- the rules, one by one


def calm(law: DecodeLaw, seconds: float, begin: float = 0.0, gap: float = 0.01) -> None:
    at = begin
    while at <= begin + seconds:
        law.next(Sample(at, gap_s=gap))
        at += TICK


def test_decode_goes_down_one_step_after_three_seconds() -> None:
    law = DecodeLaw((600, 900, 1200), SLO_GAP)
    calm(law, 2.5)
    assert law.clock == 1200
    law.next(Sample(3.0, gap_s=0.01))
    assert law.clock == 900
    calm(law, 2.5, begin=3.5)
    law.next(Sample(6.5, gap_s=0.01))
    assert law.clock == 600
    calm(law, 30, begin=7)
    assert law.clock == 600, "the floor"


def test_between_calm_and_alarm_the_clock_stays() -> None:
    law = DecodeLaw((600, 900, 1200), SLO_GAP)
    calm(law, 3)
    assert law.clock == 900
    calm(law, 30, begin=10, gap=0.9 * SLO_GAP)
    assert law.clock == 900


@pytest.mark.parametrize("alarm", [Sample(3.1, gap_s=0.96 * SLO_GAP), Sample(3.1, gap_s=0.01, queued=1)])
def test_decode_goes_straight_to_the_top(alarm: Sample) -> None:
    law = DecodeLaw((600, 900, 1200), SLO_GAP)
    calm(law, 8)
    assert law.clock == 600
    assert law.next(alarm) == 1200 and law.at_top


def test_prefill_dwells_but_not_on_its_way_up() -> None:
    law = PrefillLaw((600, 900, 1200), SLO_TTFT)
    assert law.next(Sample(0.0, prompts=0)) == 1200, "nothing is known yet"
    assert law.next(Sample(1.0, ttft_s=0.2, prompts=1)) == 600
    assert law.next(Sample(1.05, ttft_s=0.99, prompts=1)) == 1200
    assert law.next(Sample(1.05 + DWELL / 2, prompts=0)) == 1200
    law.next(Sample(1.05 + DWELL, ttft_s=0.3, prompts=1))
    assert law.next(Sample(20.0, ttft_s=0.3, queued=3, prompts=1)) == 1200


def test_more_prompts_in_flight_need_a_higher_clock() -> None:
    def chosen(prompts: int) -> int:
        law = PrefillLaw((600, 900, 1200), SLO_TTFT)
        return law.next(Sample(0.0, ttft_s=0.4, prompts=prompts))

    assert [chosen(prompts) for prompts in (1, 2, 5)] == [600, 900, 1200]


def governor() -> Governor:
    return Governor({"prefill": PrefillLaw((600, 1200), SLO_TTFT), "decode": DecodeLaw((600, 1200), SLO_GAP)})


def test_without_data_clocks_are_the_default_ones() -> None:
    one = governor()
    assert one.next(None, 0.0).why == NO_DATA and one.next(None, 0.0).clocks == {"prefill": None, "decode": None}
    assert one.next(Sample(0.0, gap_s=0.01), 1.0).why == ""
    assert one.next(Sample(0.0, gap_s=0.01), 10.0).why == NO_DATA, "old figures are none"


def test_an_slo_missed_twice_at_the_top_ends_governing_until_it_is_kept() -> None:
    one = governor()
    assert one.next(Sample(0.0, gap_s=0.06), 0.0).why == ""
    assert one.next(Sample(0.5, gap_s=0.06), 0.5).why == SLO_MISSED
    assert one.next(Sample(1.0, gap_s=0.04, queued=1), 1.0).why == SLO_MISSED
    assert one.next(Sample(1.5, gap_s=0.04), 1.5).why == ""


def test_steps_are_supported_and_go_from_the_floor_to_the_top() -> None:
    found = steps(MODEL.clocks(), 800)
    assert found[0] == 810 and found[-1] == 1980 and len(found) == 12 and set(found) <= set(MODEL.clocks())
    assert steps((600, 900), 600) == (600, 900) and steps((600, 900), 5000) == (900,)
