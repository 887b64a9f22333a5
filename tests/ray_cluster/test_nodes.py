"""Nodes that die and join, and announcements from elsewhere.

The tests share one cluster, in this order. Its head has the proxy, one decode and no prefill.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from disagg_sim import SimConfig, SimEngine
from tests.ray_cluster.conftest import LIMIT, Load, RayCluster, until

pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ExitStack() as hold:
        made = RayCluster(tmp_path_factory.mktemp("nodes"), hold)
        made.raw["prefill"]["count"] = 2
        try:
            made.add_node(1, {"d": 1})
            made.add_node(2, {"p": 1})
            made.add_node(3, {"p": 1})
            made.add_node(4, {"d": 1})
            made.up()
            yield made
        finally:
            made.close()


def stream(cluster: RayCluster, tokens: int) -> Iterator[bytes]:
    """Lines of one streamed completion; ends early where the connection is cut."""
    body = {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": tokens, "stream": True}
    sent = urllib.request.Request(
        f"{cluster.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(sent, timeout=LIMIT) as answer:
            yield from answer
    except OSError:
        return


def test_a_prefill_node_that_dies_fails_no_request(cluster: RayCluster) -> None:
    cluster.until_ready(2, 2)
    with Load(cluster) as load:
        cluster.remove_node(3)
        cluster.until_ready(1, 2)
        load.more()
    assert load.failed == []


def test_a_node_that_comes_brings_its_engine_back(cluster: RayCluster) -> None:
    cluster.add_node(5, {"p": 1})
    cluster.until_ready(2, 2)
    assert any(one.startswith(cluster.address(5)) for one in cluster.engines("prefill"))
    assert cluster.complete() == 200


def test_a_decode_node_that_dies_cuts_its_own_streams_only(cluster: RayCluster) -> None:
    streams: dict[int, list[bytes]] = {}

    def follow(number: int) -> None:
        streams[number] = []
        for line in stream(cluster, 200):
            streams[number].append(line)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(streams) == 4 and all(len(lines) > 2 for lines in streams.values()), "all streams have begun")
    (instances,) = cluster.proxies.instances().values()
    assert instances
    busy = {one["http_address"]: one["in_flight"] for one in instances if one["role"] == "decode"}
    there = sum(count for engine, count in busy.items() if engine.startswith(f"{cluster.address(4)}:"))
    assert sum(busy.values()) == 4 and there > 0, busy
    cluster.remove_node(4)
    for thread in threads:
        thread.join()
    complete = [number for number, lines in streams.items() if b"data: [DONE]\n" in lines]
    assert len(complete) == 4 - there
    cluster.until_ready(2, 1)
    with Load(cluster) as load:
        load.more()
    assert load.failed == []
    cluster.add_node(6, {"d": 1})
    cluster.until_ready(2, 2)


async def forge(cluster: RayCluster, forged: dict[str, str]) -> None:
    """A host with an engine that has another secret announces it with these fields until that is dropped."""
    host = cluster.address(99)
    engine = SimEngine(SimConfig(role="decode", connector="disagg_kv", host=host, kv_secret="guessed"))
    await engine.start()
    context = zmq.asyncio.Context()
    sender = context.socket(zmq.DEALER)
    sender.connect(f"tcp://{host}:0;{cluster.address(1)}:{cluster.registration_port}")
    before = dropped(cluster)
    try:
        while dropped(cluster) == before:
            await sender.send(msgpack.packb({**engine._pinger.fields(), **forged}))
            await asyncio.sleep(0.05)
    finally:
        context.destroy(linger=0)
        await engine.stop()


def test_a_forged_announcement_displaces_nobody(cluster: RayCluster) -> None:
    """From a host that knows every address, and not the secret."""

    def seen() -> dict[str, Any]:
        (instances,) = cluster.proxies.instances().values()
        same = ("role", "kv_address", "state", "restarts")
        return {one["http_address"]: [one[key] for key in same] for one in instances or ()}

    before = seen()
    real = cluster.engines("decode")[0]
    with Load(cluster) as load:
        for forged in (
            {},
            {"http_address": real},
            {"zmq_address": before[real][1]},
            {"http_address": real, "type": "P"},
        ):
            asyncio.run(asyncio.wait_for(forge(cluster, forged), LIMIT))
        load.more()
    assert load.failed == [] and seen() == before
    assert set(dropped(cluster)) == {"unproven"}


def dropped(cluster: RayCluster) -> dict[str, Any]:
    """Registrations that the proxy did not count, by reason."""
    with urllib.request.urlopen(f"{cluster.url}/stats", timeout=LIMIT) as answer:
        found: dict[str, Any] = json.load(answer)["discovery"]["dropped"]
    return found
