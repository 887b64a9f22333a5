"""The head node dies: requests go on, through a proxy on another node."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ray_cluster.conftest import Load, RayCluster

pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")


@pytest.mark.timeout(1800)
def test_requests_go_on_without_the_head(tmp_path: Path) -> None:
    with ExitStack() as hold:
        cluster = RayCluster(tmp_path, hold, proxy_node=2)
        try:
            cluster.add_node(1, {})
            # As docs/cluster.md says; by default the other nodes end after 60 s.
            patient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3600"}
            cluster.add_node(2, {"p": 1, "d": 1}, **patient)
            cluster.add_node(3, {"d": 1}, **patient)
            cluster.up()
            cluster.until_ready(1, 2)
            before = cluster.processes()
            with Load(cluster) as load:
                cluster.remove_node(1)
                load.more(200)
            assert load.failed == []
            assert cluster.processes() == before
            assert cluster.run("status", code=3)
        finally:
            cluster.close()
