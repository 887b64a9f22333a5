"""The report of `disagg-proxy cluster status`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from disagg_ray import status
from disagg_ray.preflight import Host
from disagg_ray.status import Deployment, View


def engine(role: str, address: str, **changes: Any) -> dict[str, Any]:
    plain = {"state": "ready", "draining": False, "in_flight": 0, "reason": "serves"}
    return {"role": role, "http_address": address, **plain, **changes}


VIEW = View(
    name="qwen",
    app="RUNNING",
    hosts=[Host("w", "10.0.0.2", False, {"CPU": 8, "GPU": 2}), Host("h", "10.0.0.1", True, {"CPU": 4})],
    deployments=[Deployment("prefill", "HEALTHY", replicas={"RUNNING": 1, "STARTING": 0})],
    running=[("prefill", "10.0.0.2"), ("decode", "10.0.0.2")],
    proxies={
        "http://10.0.0.1:10001": [
            engine("decode", "10.0.0.2:20001", in_flight=3),
            engine("prefill", "10.0.0.2:20000", draining=True),
        ]
    },
)


def test_nodes_replicas_and_engines_are_shown() -> None:
    assert list(status.lines(VIEW)) == [
        "qwen: running",
        "nodes",
        "  10.0.0.1 (head)  CPU 4",
        "  10.0.0.2  CPU 8, GPU 2  runs 1 decode, 1 prefill",
        "replicas",
        "  prefill  healthy  1 running",
        "proxy http://10.0.0.1:10001",
        "  prefill 10.0.0.2:20000  ready  draining  0 in flight  serves",
        "  decode 10.0.0.2:20001  ready  3 in flight  serves",
    ]
    assert status.healthy(VIEW)


def test_an_engine_that_no_proxy_knows_is_a_problem_of_its_node() -> None:
    view = replace(VIEW, running=[*VIEW.running, ("decode", "10.0.0.3")])
    line = "problem: node 10.0.0.3: 1 decode run, http://10.0.0.1:10001 knows 0"
    assert list(status.lines(view))[-1] == line and not status.healthy(view)


def test_a_lost_engine_does_not_count() -> None:
    view = replace(VIEW, proxies={"u": [engine("prefill", "10.0.0.2:1", state="lost"), engine("decode", "10.0.0.2:2")]})
    assert "problem: node 10.0.0.2: 1 prefill run, u knows 0" in list(status.lines(view))


def test_problems_and_silent_proxies_are_shown() -> None:
    view = replace(
        VIEW,
        proxies={**VIEW.proxies, "http://10.0.0.9:10001": None},
        problems=["node 10.0.0.2: secret_file: its secret is not that of the proxies"],
        deployments=[Deployment("decode", "UNHEALTHY", "it\n ended", {})],
    )
    lines = list(status.lines(view))
    assert "proxy http://10.0.0.9:10001 does not answer" in lines
    assert "problem: node 10.0.0.2: secret_file: its secret is not that of the proxies" in lines
    assert "    it ended" in lines and not status.healthy(view)
