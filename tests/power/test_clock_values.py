"""Units and rounding: what a user writes, and the supported value that it becomes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from disagg_power.clock_values import BadValue, ClockSetting, evenly, nearest, parse_clock, parse_watts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", None),
        ("1410", ClockSetting(1410)),
        (" 1410 MHz ", ClockSetting(1410)),
        ("lock:1410", ClockSetting(1410, pinned=True)),
        ("LOCK: 990mhz", ClockSetting(990, pinned=True)),
    ],
)
def test_a_clock_is_in_mhz_and_a_cap_unless_it_is_locked(text: str, wanted: ClockSetting | None) -> None:
    assert parse_clock(text) == wanted


@pytest.mark.parametrize("text", ["1.41 GHz", "1410 Hz", "lock:", "fast", "-5", "1", "00", "1410,1500", "450W"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadValue, match="lock:1410"):
        parse_clock(text)


def test_a_power_limit_is_in_watts() -> None:
    assert (parse_watts("450"), parse_watts("450.5 W"), parse_watts("")) == (450.0, 450.5, None)
    for text in ("450000mW", "0", "much", "-1"):
        with pytest.raises(BadValue, match="watts"):
            parse_watts(text)


def test_a_setting_reads_as_it_was_written() -> None:
    assert [str(parse_clock(text)) for text in ("1410", "lock:1410")] == ["1410", "lock:1410"]


@pytest.mark.parametrize(
    ("mhz", "found"), [(1400, 1395), (1403, 1410), (1402, 1395), (345, 345), (10, 345), (9999, 1980), (1980, 1980)]
)
def test_the_nearest_supported_clock(mhz: int, found: int) -> None:
    supported = list(range(345, 1981, 15))
    assert nearest(supported, mhz) == found


def test_of_two_equally_near_clocks_the_lower_one() -> None:
    assert nearest([300, 400], 350) == 300


def test_clocks_of_a_sweep_are_supported_and_cover_the_range() -> None:
    supported = list(range(345, 1981, 15))
    found = evenly(supported, 8)
    assert len(found) == 8 and found[0] == 345 and found[-1] == 1980 and set(found) <= set(supported)
    assert max(b - a for a, b in pairwise(found)) <= (1980 - 345) / 7 + 15
    assert evenly([300, 400], 8) == [300, 400] and evenly(supported, 1) == [1980]
