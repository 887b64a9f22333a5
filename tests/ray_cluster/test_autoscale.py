"""The number of decodes follows their load, by the policy in disagg_ray/scaling.py."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ray_cluster.conftest import Load, RayCluster

pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")


@pytest.mark.timeout(1800)
def test_decodes_follow_their_load(tmp_path: Path) -> None:
    """More requests than 0.8 of the slots of one decode, then none; a decode leaves by its drain."""
    with ExitStack() as hold:
        cluster = RayCluster(tmp_path, hold)
        try:
            cluster.add_node(1, {"p": 1, "d": 2}, cpus=4)
            args = cluster.raw["decode"]["args"]
            scale = {"min": 1, "max": 2, "up_s": 1, "down_s": 1}
            cluster.up(decode={"args": args, "resources": {"d": 1}, "autoscale": scale})
            cluster.until_ready(1, 1)
            with Load(cluster, clients=10, tokens=40) as load:
                cluster.until_ready(1, 2)
            cluster.until_ready(1, 1)
            assert load.failed == []
        finally:
            cluster.close()
