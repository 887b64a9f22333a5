"""What is refused before anything starts: each line names the node and the setting."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import preflight, settings
from disagg_ray.preflight import Host, Report
from disagg_ray.settings import Cluster, Proxy, Role

HEAD = Host("h", "10.0.0.1", True, {"CPU": 8})
WORKER = Host("w", "10.0.0.2", False, {"CPU": 8, "GPU": 4, "big": 1})
HOSTS = [HEAD, WORKER]
FINE = {"h": Report(fingerprint="f"), "w": Report(engines=True, fingerprint="f", http=5, kv=5, vllm="0.32.0")}


def problems(cluster: Cluster, running: bool = False, **worker: Any) -> list[str]:
    return preflight.problems(cluster, HOSTS, {**FINE, "w": replace(FINE["w"], **worker)}, running)


def test_nothing_is_wrong(cluster: Cluster) -> None:
    assert problems(cluster) == []
    assert problems(replace(cluster, engine="vllm", prefill=Role(2), decode=Role(1, 2))) == []


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        ({"error": "secret_file: /s: No such file"}, "node 10.0.0.2: secret_file: /s: No such file"),
        ({"fingerprint": "g"}, "node 10.0.0.2: secret_file: its secret is not that of the proxies"),
        ({"model": False}, "node 10.0.0.2: model: Qwen3-4B is not there"),
        ({"http": 0}, "node 10.0.0.2: ports.http: no port of 20000-20999 is free"),
        ({"kv": 0}, "node 10.0.0.2: ports.kv: no port of 21000-22999 is free"),
        ({"version": "0.1"}, "node 10.0.0.2: has disagg-proxy 0.1"),
        ({"proxy_taken": (10001,)}, "node 10.0.0.2: proxy.port, proxy.registration_port: 10001 is taken"),
    ],
)
def test_a_problem_of_a_node_is_one_line(cluster: Cluster, worker: dict[str, Any], line: str) -> None:
    (found,) = problems(cluster, **worker)
    assert found.startswith(line)


def test_its_own_ports_are_no_problem_for_what_runs(cluster: Cluster) -> None:
    assert problems(cluster, running=True, proxy_taken=(10001,)) == []


def test_vllm_must_be_there_and_usable(cluster: Cluster) -> None:
    cluster = replace(cluster, engine="vllm", python="/opt/vllm/bin/python")
    assert problems(cluster, vllm="") == ["node 10.0.0.2: python: /opt/vllm/bin/python has no vLLM"]
    assert problems(cluster, vllm_problem="it is too old") == ["node 10.0.0.2: python: it is too old"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"prefill": Role(tensor_parallel=8)}, "prefill.tensor_parallel: no node has GPU: 8"),
        ({"decode": Role(resources={"huge": 2})}, "decode.resources: no node has huge: 2, GPU: 1"),
        ({"prefill": Role(3), "decode": Role(2)}, "prefill.count, decode.count: need 5 GPUs, the cluster has 4"),
        ({"prefill": Role(2, per_node=1)}, "prefill.per_node: 2 engines do not fit on 1 nodes with 1 on each"),
        ({"proxy": Proxy(nodes=("10.0.0.7",))}, "proxy.nodes: 10.0.0.7 is no node of this Ray cluster"),
    ],
)
def test_what_no_node_can_do_is_refused(cluster: Cluster, change: dict[str, Any], line: str) -> None:
    assert problems(replace(cluster, engine="vllm", **change)) == [line]


def test_a_node_reports_itself(raw: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        cluster = settings.parse({**raw, "proxy": {"port": taken, "registration_port": 1 if taken != 1 else 2}})
        report = preflight.look(cluster, "127.0.0.1", engines=True, proxy=True, environ={})
    assert report.engines and report.http == report.kv == 64 and not report.error
    assert taken in report.proxy_taken and len(report.fingerprint) == 12 and "secret" not in report.fingerprint


def test_the_environment_of_a_node_names_another_secret(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another secret\n")
    cluster = settings.parse(raw)
    environ = {"DISAGG_KV_SECRET_FILE": str(tmp_path / "other")}
    here = preflight.look(cluster, "127.0.0.1", False, False, {})
    there = preflight.look(cluster, "127.0.0.1", False, False, environ)
    assert here.fingerprint != there.fingerprint


def test_a_secret_that_cannot_be_read_is_the_nodes_problem(raw: dict[str, Any]) -> None:
    cluster = settings.parse({**raw, "secret_file": "/does/not/exist"})
    assert preflight.look(cluster, "127.0.0.1", True, True, {}).error.startswith("secret_file: /does/not/exist")
