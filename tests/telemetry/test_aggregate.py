"""The merge of several processes' totals: sums are exact, and counters never decrease."""

from __future__ import annotations

import statistics
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.address import parse_address
from disagg_proxy.cluster.instance import Instance, Role, Source
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.telemetry.aggregate import (
    ProcessTotals,
    RetiredTotals,
    gauges_of,
    merge,
    pack_stats,
    retire,
    unpack,
    unpack_retired,
)
from disagg_proxy.telemetry.stats import Latency, Stats

_MAX_BYTES = 256 * 1024


def part_of(stats: Stats, incarnation: int = 1, **more: dict) -> ProcessTotals:
    instances = more.get("instances", {})
    return ProcessTotals(incarnation, pack_stats(stats), instances, more.get("gauges", {}), more.get("refused", {}))


def retired_totals(workers: int = 2) -> RetiredTotals:
    return RetiredTotals(
        5.0, 3, {"malformed": 1}, [], [0] * workers, [{"worker": n, "restarts": 0} for n in range(workers)]
    )


def counted(finished: int, latencies: list[float] = []) -> Stats:  # noqa: B006 - it is not changed
    stats = Stats(lambda: 0.0)
    stats.outcomes["ok"] = finished
    stats.in_flight = 1
    stats.kv_releases.done = finished
    stats.kv_releases.waiting = 2
    for value in latencies:
        stats.ttft.add(value)
    return stats


def test_an_empty_text_means_nothing_was_published() -> None:
    assert unpack(b"") is None and unpack_retired(b"") is None


def test_sums_and_percentiles_are_those_of_one_process() -> None:
    slow, fast = [0.1 * n for n in range(1, 40)], [0.001 * n for n in range(1, 100)]
    merged = merge([part_of(counted(3, slow)), part_of(counted(4, fast))], retired_totals())
    assert merged.stats.outcomes == Counter(ok=7) and merged.stats.in_flight == 2
    assert (
        merged.stats.kv_releases.done == 7 and merged.stats.kv_releases.waiting == 4 and merged.stats.started_at == 5.0
    )
    alone = Latency()
    for value in (*slow, *fast):
        alone.add(value)
    assert merged.stats.ttft.summary() == alone.summary()
    assert merged.stats.ttft.summary()["p50_s"] == round(statistics.median_low([*slow, *fast]), 6)
    assert merged.registrations.messages == 3 and merged.registrations.dropped == Counter(malformed=1)


def test_what_each_worker_observes_alike_is_not_added_up() -> None:
    parts = [part_of(counted(0), refused={"a": 2, "b": 1}), part_of(counted(0), refused={"a": 3})]
    assert merge(parts, retired_totals()).refused == Counter(a=3, b=1)


def test_an_instance_is_suspect_and_busy_as_long_as_one_process_says_so() -> None:
    mine, others = (Instance(Role.DECODE, parse_address("h:1"), None, Source.STATIC, P2P) for _ in range(2))

    def seen() -> tuple[bool, bool]:
        parts = [part_of(counted(1), gauges=gauges_of([one], 100.0)) for one in (mine, others)]
        merged = merge(parts, retired_totals())
        return merged.suspect(mine), merged.busy(mine)

    assert seen() == (False, False)
    others.suspect = True
    assert seen() == (True, False)
    mine.breaker.record_busy(100.0)
    mine.suspect, others.suspect = True, False
    assert seen() == (True, True)


def test_gauges_end_with_their_worker_and_counters_stay() -> None:
    retired = retired_totals()
    one = {"h:1": {"requests_total": 5}}
    dead = part_of(counted(5, [1.0]), gauges={"queued": 4, "in_background": 1}, instances=one)
    alive = part_of(counted(2), gauges={"queued": 1}, instances={"h:1": {"requests_total": 2}})
    before = merge([dead, alive], retired)
    assert (before.queued, before.in_background, before.stats.in_flight) == (5, 1, 2)
    retire(dead, retired, 0, 1)
    for parts in ([dead, alive], [part_of(Stats(lambda: 0.0), 2), alive]):
        after = merge(parts, retired)
        assert after.stats.outcomes["ok"] == 7 and after.stats.ttft.count == 1
        assert after.instances["h:1"]["requests_total"] == 7
        assert (after.queued, after.in_background) == (1, 0)
        assert (after.stats.in_flight, after.stats.kv_releases.waiting) == (1, 2)
    assert unpack_retired(retired.pack()) == retired


def test_a_worker_that_died_before_it_published_adds_nothing() -> None:
    retired = retired_totals()
    old = part_of(counted(5), incarnation=1)
    retire(old, retired, 0, 1)
    retire(old, retired, 0, 2)
    assert merge([None, None], retired).stats.outcomes["ok"] == 5


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.booleans()), max_size=30))
def test_counters_never_decrease(steps: list[tuple[int, int, bool]]) -> None:
    retired, incarnations, totals = retired_totals(), [1, 1], [0, 0]
    parts: list[ProcessTotals | None] = [None, None]
    seen = 0
    for worker, more, dies in steps:
        totals[worker] += more
        parts[worker] = part_of(counted(totals[worker]), incarnations[worker])
        shown = merge(parts, retired).stats.outcomes["ok"]
        assert shown == seen + more
        seen = shown
        if dies:
            retire(parts[worker], retired, worker, incarnations[worker])
            incarnations[worker] += 1
            totals[worker] = 0


def test_totals_that_are_too_long_are_published_without_instances_and_recent_latencies() -> None:
    many = {f"host-{n}:1": {"requests_total": n} for n in range(20_000)}
    text = part_of(counted(5, [1.0] * 100), instances=many).pack(_MAX_BYTES)
    part = unpack(text)
    assert len(text) <= _MAX_BYTES and part is not None
    assert part.stats["outcomes"] == {"ok": 5} and part.stats["ttft"][2:] == [100, b""]
    assert sum(part.stats["ttft"][1]) == 100
