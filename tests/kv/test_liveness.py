"""When a silent peer counts as dead, and how often failures are logged."""

from __future__ import annotations

from disagg_kv.decode.liveness import PROBES, STALLS, Liveness
from disagg_kv.tally import Tally


def test_a_peer_that_answers_no_probe_is_dead_after_twice_the_stall_limit() -> None:
    liveness = Liveness(5.0)
    assert liveness.interval * PROBES == STALLS * 5.0 == 10.0
    liveness.reset()
    assert [liveness.check() for _ in range(PROBES)] == [True] * (PROBES - 1) + [False]


def test_anything_that_is_heard_starts_the_count_again() -> None:
    liveness = Liveness(5.0)
    for _ in range(PROBES - 1):
        assert liveness.check()
    liveness.on_data()
    assert all(liveness.check() for _ in range(PROBES)) and not liveness.check()


def test_kv_on_its_way_is_life() -> None:
    liveness = Liveness(5.0)
    assert all(liveness.check(receiving=True) for _ in range(10 * PROBES))
    assert all(liveness.check() for _ in range(PROBES - 1)) and not liveness.check()


def test_a_time_without_probes_does_not_count() -> None:
    liveness = Liveness(5.0)
    for _ in range(PROBES - 1):
        liveness.check()
    liveness.reset()
    assert all(liveness.check() for _ in range(PROBES - 1)) and not liveness.check()


def test_failures_are_logged_at_once_and_then_once_a_minute() -> None:
    now, lines = [0.0], list[str]()
    tally = Tally("lost", lines.append, clock=lambda: now[0])
    tally.add(["a"])
    assert lines == ["lost: 1 (1 x a), 1 since the start"]
    for _ in range(50):
        tally.add(["a", "b", "a"])
    now[0] = 59
    tally.add([])
    assert len(lines) == 1
    now[0] = 60
    tally.add([])
    tally.add([])
    assert lines[1:] == ["lost: 150 (100 x a; 50 x b), 151 since the start"]


def test_reasons_that_a_peer_chooses_do_not_fill_the_log() -> None:
    lines = list[str]()
    tally = Tally("lost", lines.append)
    tally.add(f"{number} {'x' * 1000}" for number in range(1000))
    assert tally.total == 1000 and len(lines) == 1
    Tally("lost", lines.append).add([])
    assert len(lines) == 1 and len(lines[0]) < 1200
