"""The service on three nodes: start, scale, update, and each thing that can die.

The tests share one cluster, in this order; each leaves one prefill and two decodes.
"""

from __future__ import annotations

import os
import signal

import pytest

from disagg_ray import claims
from tests.ray_cluster.conftest import Load, RayCluster, gone, parent, until

pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module", autouse=True)
def _up(cluster: RayCluster) -> None:
    output = cluster.up()
    assert f"tested: serves at {cluster.url}" in output and "prefill: 1 running" in output


@pytest.fixture(autouse=True)
def _serves(cluster: RayCluster, _up: None) -> None:
    cluster.until_ready(1, 2)
    assert cluster.complete() == 200


def test_status_shows_nodes_replicas_and_engines(cluster: RayCluster) -> None:
    output = cluster.run("status")
    assert "tested: running" in output and "problem" not in output
    for number in (1, 2, 3):
        assert f"  {cluster.address(number)}" in output
    for engine in cluster.engines():
        assert f"{engine}  ready" in output


def test_scaling_up_and_down_fails_no_request(cluster: RayCluster) -> None:
    with Load(cluster) as load:
        cluster.run("scale", "prefill=3")
        cluster.until_ready(3, 2)
        load.more()
        cluster.run("scale", "prefill=1")
        cluster.until_ready(1, 2)
        load.more()
    assert load.failed == []
    until(lambda: len([one for one in cluster.processes() if one.startswith("http")]) == 3, "two engines are gone")


def test_an_update_replaces_engines_one_by_one_and_fails_no_request(cluster: RayCluster) -> None:
    before = set(cluster.processes().values())
    decode = {**cluster.raw["decode"], "args": [*cluster.raw["decode"]["args"], "--max-num-seqs", "64"]}
    with Load(cluster) as load:
        cluster.up(decode=decode)
        cluster.until_ready(1, 2)
        load.more()
    assert load.failed == []
    after = set(cluster.processes().values())
    assert len(before & after) == 2 and len(after) == 4, "the prefill and the proxy are those of before"


def test_a_drained_engine_gets_nothing_until_it_is_undrained(cluster: RayCluster) -> None:
    engine = cluster.engines("decode")[0]
    assert f"{engine}: drained" in cluster.run("drain", engine)
    assert engine not in cluster.engines("decode")
    assert f"{engine}: gets requests again" in cluster.run("undrain", engine.rpartition(":")[0])
    assert engine in cluster.engines("decode")
    assert "no proxy knows" in cluster.run("drain", "10.99.0.1:1", code=2)


@pytest.mark.parametrize("victim", ["engine", "keeper", "actor"])
def test_a_killed_engine_is_replaced_and_leaves_nothing_behind(cluster: RayCluster, victim: str) -> None:
    engine = cluster.engines("decode")[0]
    pid = cluster.pid(engine)
    keeper = parent(pid)
    actor = parent(keeper)
    with Load(cluster) as load:
        os.kill({"engine": pid, "keeper": keeper, "actor": actor}[victim], signal.SIGKILL)
        until(lambda: gone(pid) and gone(keeper), "engine and keeper are gone")
        until(lambda: pid not in cluster.processes().values(), "the port is free")
        cluster.until_ready(1, 2)
        load.more()
    until(lambda: gone(actor), "Serve ends the replica of a dead engine")
    assert set(load.failed) <= {502}, "only requests whose answer that engine was giving"


@pytest.mark.parametrize("victim", ["proxy", "actor"])
def test_a_killed_proxy_is_replaced_on_its_ports(cluster: RayCluster, victim: str) -> None:
    name = f"proxy-{cluster.proxy_host}-{cluster.proxy_port}"
    pid = cluster.processes()[name]
    os.kill({"proxy": pid, "actor": parent(parent(pid))}[victim], signal.SIGKILL)
    until(lambda: gone(pid), "the proxy is gone")
    until(lambda: cluster.processes().get(name, pid) != pid, "another proxy runs")
    cluster.until_ready(1, 2)
    assert cluster.complete() == 200


def test_down_leaves_nothing_behind(cluster: RayCluster) -> None:
    pids = cluster.processes().values()
    assert len(pids) == 4
    assert "tested: stopped" in cluster.run("down")
    until(lambda: all(map(gone, pids)), "all processes have ended")
    # A claim of a killed actor may be left; it is nobody's, and the next replica on that node removes it.
    for number in (1, 2, 3):
        claims.sweep(str(cluster.folder / "run"), cluster.address(number))
    assert list((cluster.folder / "run/claims").iterdir()) == []
    assert "nothing runs here" in cluster.run("status", code=3)
