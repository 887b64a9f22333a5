"""The memory measurement in a few seconds: that it measures, and that its rules can be broken."""

import pytest

from bench import memory, workers


def test_a_slope() -> None:
    assert memory.slope([(0, 5), (1, 7), (2, 9)]) == 2
    assert memory.slope([(0, 1), (10, 3), (20, 2)]) == pytest.approx(0.05)


async def test_small_requests() -> None:
    result = (await memory.run(200, 0, 0, seed=3))["requests"]
    assert result["exit_code"] == 0 and len(result["readings"]) == 11
    assert sum(result["outcomes"].values()) == 200 and {"whole: 200", "stream: 200"} <= set(result["outcomes"])
    served = sum(count for kind, count in result["outcomes"].items() if kind.endswith("200"))
    assert result["stats"]["requests"]["outcomes"]["ok"] == served
    assert all(reading["rss"] > reading["heap"] > 10 for reading in result["readings"])


async def test_open_streams() -> None:
    result = (await memory.run(0, 24, 1.2, seed=3))["streams"]
    assert result["exit_code"] == 0 and result["tokens"] >= 48
    moments = [reading for reading in result["readings"] if "open" in reading]
    assert len(moments) == 12 and all(reading["open"] == 24 and reading["files"] > 48 for reading in moments)
    assert result["stats"]["requests"]["outcomes"] == {"client_left": 48}


@pytest.mark.parametrize(("leak", "flat"), [(0, True), (10_000, False)])
async def test_growth_breaks_the_rule(leak: int, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real, heap = memory.Proxy.reading, [50.0]

    def reading(proxy: memory.Proxy) -> dict[str, float]:
        heap[0] += leak * 20 / 2**20
        return {**real(proxy), "heap": heap[0]}

    monkeypatch.setattr(memory.Proxy, "reading", reading)
    assert (await memory.run(200, 0, 0, seed=3))["requests"]["flat"] is flat


async def test_two_workers_are_measured() -> None:
    result = await workers.measure(2, 120, 6, 1)
    assert (result["requests"], result["failed"]) == (120, 0)
    assert len(result["cpu_seconds_of_each_process"]) == 3 and result["requests_per_second"] > 10
    lines = workers.table([result, {**result, "requests_per_second": 10.0, "pinned": False}]).splitlines()
    assert lines[1].startswith("2 ") and "(10-" in lines[1] and "not pinned" in lines[2]


def test_cores_are_told_apart_only_where_there_are_enough() -> None:
    assert workers.cores_for(2, range(3)) is None
    assert workers.cores_for(2, range(8)) == ({0, 1}, {2, 3, 4, 5, 6, 7})
