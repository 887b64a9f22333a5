"""The load that engines show: what is read from their /metrics, and when they are asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.outcomes import LABELS, RECOMPUTED, UNFETCHED
from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.errors import EngineDeadline
from disagg_proxy.health import load_reader
from disagg_proxy.health.load_reader import FILTERED, FORGET_AFTER, LoadReader, engine_load
from tests.cluster.conftest import World, world
from tests.conftest import soon

__all__ = ["world"]

ONE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b} 7"} 12.0
vllm:num_requests_waiting{engine="0",model_name="a b} 7"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a b} 7",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="a b} 7"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100",num_gpu_blocks_override="None"} 1.0
"""


def test_one_engine_core() -> None:
    assert engine_load(ONE, 5.0) == EngineLoad(5.0, 12, 3, 0.25, 1600, None)


def test_the_size_that_the_engine_names_comes_before_its_blocks() -> None:
    named = ONE.replace(b'num_gpu_blocks="100"', b'kv_cache_size_tokens="1234",num_gpu_blocks="100"')
    load = engine_load(named, 0.0)
    assert load is not None and load.kv_capacity_tokens == 1234
    load = engine_load(named.replace(b'"1234"', b'"None"'), 0.0)
    assert load is not None and load.kv_capacity_tokens == 1600


@pytest.mark.parametrize(("size", "capacity"), [(b"", 3200), (b'kv_cache_size_tokens="1500",', 3000)])
def test_data_parallel_cores_are_added_up_and_their_usage_is_averaged(size: bytes, capacity: int) -> None:
    text = b"""
vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 2.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_requests_waiting{engine="1"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.0
vllm:cache_config_info{block_size="16",engine="0",%bnum_gpu_blocks="200"} 1.0
vllm:cache_config_info{block_size="16",engine="1",%bnum_gpu_blocks="200"} 1.0
"""
    assert engine_load(text % (size, size), 0.0) == EngineLoad(0.0, 3, 5, 0.25, capacity, None)


@pytest.mark.parametrize("name", [RECOMPUTED, UNFETCHED])
def test_kv_counts_as_dropped_when_prefill_gave_it_up(name: str) -> None:
    counts = {reason: 10**place for place, reason in enumerate(LABELS[name])}
    lines = "".join(
        f'vllm:{name}_total{{engine="0",reason="{reason}"}} {count}.0\nvllm:{name}_created{{engine="0"}} 1.7e9\n'
        for reason, count in counts.items()
    )
    text = ONE + lines.encode()
    dropped = counts["overload"] + counts["expired"]
    load, of_two = engine_load(text, 0.0), engine_load(text, 0.0, ranks=2)
    assert load is not None and load.kv_dropped == dropped
    assert of_two is not None and of_two.kv_dropped == round(dropped / 2)


@pytest.mark.parametrize("text", [
    b"",
    b"process_cpu_seconds_total 1.0\n",
    b"\nvllm:num_requests_running{} many\n",
    b"\nvllm:num_requests_running nan\n",
    b'\nvllm:kv_cache_usage_perc{engine="0"} +Inf\nvllm:num_requests_waiting{} +Inf\n',
    b"\nvllm:num_requests_running{",
])  # fmt: skip
def test_what_shows_no_load(text: bytes) -> None:
    assert engine_load(text, 0.0) is None


class Engines:
    """Answers GET /metrics with ``text``, or not at all while it is None."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.text: bytes | None = ONE
        self.filters = True

    async def request(self, method: str, instance: Instance, path: str, **more: Any) -> Any:
        assert (method, path.partition("?")[0].rstrip("/"), more["headers"]) == ("GET", "/metrics", b"key: 1\r\n")
        self.asked[instance.key] += 1
        self.paths[path] += 1
        if self.text is None:
            raise EngineDeadline("no answer")

        async def read() -> Any:
            knows = self.filters or path == "/metrics"
            return SimpleNamespace(status=200 if knows else 404, body=self.text if knows else b"")

        return SimpleNamespace(read_all=read)


class Peers:
    """The others need the load; whether this process reads it is set by the test."""

    def __init__(self) -> None:
        self.reads = False
        self.needed: list[bool] = []
        self.shared: list[Instance] = []

    def reads_loads(self, needed: bool) -> bool:
        self.needed.append(needed)
        return self.reads

    def share_load(self, instance: Instance) -> None:
        self.shared.append(instance)


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0)


async def test_ready_engines_are_read_while_the_load_is_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_reader, "INTERVAL", 0.001)
    monkeypatch.setattr(load_reader, "_MAX_PER_SECOND", 10**6)
    one, two = world.ready(Role.PREFILL, 1), world.ready(Role.DECODE, 2)
    world.ping(Role.DECODE, 3)
    engines, needed = Engines(), [False]
    reader = LoadReader(world.registry, engines, b"key: 1\r\n", lambda: needed[0])  # type: ignore[arg-type]
    reader.start()
    try:
        await asyncio.sleep(0.01)
        assert not engines.asked
        needed[0] = True
        await soon(until(lambda: min(engines.asked[one.key], engines.asked[two.key]) >= 3))
        assert set(engines.asked) == {one.key, two.key}, "one that is not ready is left out"
        assert one.engine_load == two.engine_load == EngineLoad(100.0, 12, 3, 0.25, 1600, None)
        engines.text = None
        world.time += FORGET_AFTER / 2
        asked = engines.asked[two.key]
        await soon(until(lambda: engines.asked[two.key] > asked + 1))
        assert two.engine_load is not None, "one answer that is missing is not the end of it"
        world.time += FORGET_AFTER
        await soon(until(lambda: two.engine_load is None))
        engines.text = b"process_cpu_seconds_total 1.0\n"
        asked = engines.asked[two.key]
        await soon(until(lambda: engines.asked[two.key] > asked))
        assert two.engine_load is None
        world.registry.suspend(one, "gone")
        assert one.state is State.PROBING
    finally:
        await reader.stop()


async def test_an_engine_that_shows_nothing_by_names_is_asked_for_everything(world: World) -> None:
    instance, engines = world.ready(Role.DECODE, 1), Engines()
    reader = LoadReader(world.registry, engines, b"key: 1\r\n", lambda: True)  # type: ignore[arg-type]
    await reader.read(instance)
    assert dict(engines.paths) == {FILTERED: 1} and instance.engine_load is not None
    engines.filters, instance.engine_load = False, None
    for _ in range(3):
        await reader.read(instance)
    assert dict(engines.paths) == {FILTERED: 2, "/metrics": 3} and instance.engine_load is not None


async def test_one_worker_reads_for_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_reader, "INTERVAL", 0.001)
    instance, engines, peers = world.ready(Role.DECODE, 1), Engines(), Peers()
    reader = LoadReader(world.registry, engines, b"key: 1\r\n", lambda: True, peers)  # type: ignore[arg-type]
    reader.start()
    try:
        await soon(until(lambda: len(peers.needed) >= 3))
        assert all(peers.needed) and not engines.asked
        peers.reads = True
        await soon(until(lambda: instance in peers.shared))
    finally:
        await reader.stop()
