"""The numbers of several processes as one: right sums, and counters that never go back."""

from __future__ import annotations

import statistics
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.telemetry.aggregate import Part, RetiredTotals, bury, merge, pack_stats, unpack, unpack_ground
from disagg_proxy.telemetry.stats import Latency, Stats

_MOST = 256 * 1024


def part_of(stats: Stats, incarnation: int = 1, **more: dict) -> Part:
    instances = more.get("instances", {})
    return Part(incarnation, pack_stats(stats), instances, more.get("gauges", {}), more.get("refused", {}))


def ground(workers: int = 2) -> RetiredTotals:
    return RetiredTotals(
        5.0, 3, {"malformed": 1}, [], [0] * workers, [{"worker": n, "restarts": 0} for n in range(workers)]
    )


def counted(finished: int, latencies: list[float] = []) -> Stats:  # noqa: B006 - it is not changed
    stats = Stats(lambda: 0.0)
    stats.outcomes["ok"] = finished
    stats.in_flight = 1
    stats.drains.done = finished
    stats.drains.waiting = 2
    for value in latencies:
        stats.ttft.add(value)
    return stats


def test_an_empty_text_is_nothing_published() -> None:
    assert unpack(b"") is None and unpack_ground(b"") is None


def test_sums_and_percentiles_are_those_of_one_process() -> None:
    slow, fast = [0.1 * n for n in range(1, 40)], [0.001 * n for n in range(1, 100)]
    whole = merge([part_of(counted(3, slow)), part_of(counted(4, fast))], ground())
    assert whole.stats.outcomes == Counter(ok=7) and whole.stats.in_flight == 2
    assert whole.stats.drains.done == 7 and whole.stats.drains.waiting == 4 and whole.stats.started_at == 5.0
    alone = Latency()
    for value in (*slow, *fast):
        alone.add(value)
    assert whole.stats.ttft.summary() == alone.summary()
    assert whole.stats.ttft.summary()["p50_s"] == round(statistics.median([*slow, *fast]), 6)
    assert whole.traffic.messages == 3 and whole.traffic.dropped == Counter(malformed=1)


def test_what_each_worker_sees_by_itself_is_not_added_up() -> None:
    parts = [part_of(counted(0), refused={"a": 2, "b": 1}), part_of(counted(0), refused={"a": 3})]
    assert merge(parts, ground()).refused == Counter(a=3, b=1)


def test_gauges_end_with_their_worker_and_counters_stay() -> None:
    below = ground()
    one = {"h:1": {"requests_total": 5}}
    dead = part_of(counted(5, [1.0]), gauges={"queued": 4, "in_background": 1}, instances=one)
    alive = part_of(counted(2), gauges={"queued": 1}, instances={"h:1": {"requests_total": 2}})
    before = merge([dead, alive], below)
    assert (before.queued, before.in_background, before.stats.in_flight) == (5, 1, 2)
    bury(dead, below, 0, 1)
    for parts in ([dead, alive], [part_of(Stats(lambda: 0.0), 2), alive]):
        after = merge(parts, below)
        assert after.stats.outcomes["ok"] == 7 and after.stats.ttft.count == 1
        assert after.instances["h:1"]["requests_total"] == 7
        assert (after.queued, after.in_background, after.stats.in_flight, after.stats.drains.waiting) == (1, 0, 1, 2)
    assert unpack_ground(below.pack()) == below


def test_a_worker_that_died_before_it_published_adds_nothing() -> None:
    below = ground()
    old = part_of(counted(5), incarnation=1)
    bury(old, below, 0, 1)
    bury(old, below, 0, 2)
    assert merge([None, None], below).stats.outcomes["ok"] == 5


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.booleans()), max_size=30))
def test_counters_never_go_back(steps: list[tuple[int, int, bool]]) -> None:
    below, incarnations, totals = ground(), [1, 1], [0, 0]
    parts: list[Part | None] = [None, None]
    seen = 0
    for worker, more, dies in steps:
        totals[worker] += more
        parts[worker] = part_of(counted(totals[worker]), incarnations[worker])
        shown = merge(parts, below).stats.outcomes["ok"]
        assert shown == seen + more
        seen = shown
        if dies:
            bury(parts[worker], below, worker, incarnations[worker])
            incarnations[worker] += 1
            totals[worker] = 0


def test_numbers_that_do_not_fit_are_published_without_their_longest_parts() -> None:
    many = {f"host-{n}:1": {"requests_total": n} for n in range(20_000)}
    text = part_of(counted(5, [1.0] * 100), instances=many).pack(_MOST)
    part = unpack(text)
    assert len(text) <= _MOST and part is not None
    assert part.stats["outcomes"] == {"ok": 5} and part.stats["ttft"][2:] == [100, b""]
    assert sum(part.stats["ttft"][1]) == 100
