"""The cluster file: what it may hold, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg_ray import settings
from disagg_ray.settings import ROLES, Autoscale, ClusterFileError

FILE = """
name: qwen
model: /models/Qwen3-4B
engine: vllm
prefill: {count: 2, tensor_parallel: 2, resources: {big: 1}, args: [--max-num-seqs, 64]}
decode: {count: 3, autoscale: {min: 2, max: 6}, per_node: 1}
proxy: {nodes: [head, 10.0.0.2], settings: {MAX_QUEUE: 500, SERVED_BY_HEADER: true}}
ports: {http: 20000-20099, kv: 21000-21999}
secret_file: /etc/disagg/secret
settings: {MAX_MODEL_LEN: 8192, GPU_MEMORY_UTILIZATION: 0.9}
network: {peers: [10.0.0.0/8], nccl: {NCCL_SOCKET_IFNAME: eth0}}
environment: {HF_HOME: /models/hf}
slo: {ttft_ms: 500}
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    cluster = settings.parse(settings.load(str(path)))
    assert cluster.prefill.tensor_parallel == 2 and cluster.prefill.args == ("--max-num-seqs", "64")
    assert cluster.decode.autoscale == Autoscale(2, 6) and cluster.decode.per_node == 1
    assert cluster.proxy.nodes == ("head", "10.0.0.2")
    assert cluster.proxy.settings == {"MAX_QUEUE": "500", "SERVED_BY_HEADER": "1"}
    assert cluster.ports == {"http": (20000, 20099), "kv": (21000, 21999)}
    assert cluster.settings == {"MAX_MODEL_LEN": "8192", "GPU_MEMORY_UTILIZATION": "0.9"}
    assert cluster.slo.ttft_ms == 500 and cluster.slo.itl_ms == 50


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n", "must be a mapping"), ("a: [\n", "line 2"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, text: str | None, words: str) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClusterFileError, match=words) as caught:
        settings.load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": None}, "name: is missing"),
        ({"secret_file": None}, "secret_file: is missing"),
        ({"secret_file": "secret"}, "secret_file: must be an absolute path"),
        ({"models": "x"}, "models: is unknown .known: name"),
        ({"name": "a/b"}, "name: must be letters"),
        ({"engine": "ray"}, "engine: must be vllm or sim"),
        ({"prefill": {"cuont": 1}}, "prefill.cuont: is unknown"),
        ({"prefill": {"count": 0}}, "prefill.count: must be a number from 1"),
        ({"prefill": {"count": True}}, "prefill.count: must be"),
        ({"prefill": {"tensor_parallel": 2}}, "prefill.tensor_parallel: must be 1 without GPUs"),
        ({"decode": {"autoscale": {"min": 3, "max": 2}}}, "decode.autoscale.max: must be at least"),
        ({"decode": {"autoscale": {"min": 3}}}, "decode.autoscale.max: is missing"),
        ({"decode": {"count": 9, "autoscale": {"min": 1, "max": 2}}}, "decode.count: must be from"),
        ({"decode": {"resources": {"big": 0}}}, "decode.resources.big: must be a number above 0"),
        ({"decode": {"args": "--a"}}, "decode.args: must be a list"),
        ({"proxy": {"nodes": []}}, "proxy.nodes: must be"),
        ({"proxy": {"nodes": ["node7"]}}, "proxy.nodes: must be .* not 'node7'"),
        ({"proxy": {"host": "gateway"}}, "proxy.host: must be an address, or empty"),
        ({"proxy": {"host": "10.1.0.1", "nodes": ["10.0.0.1", "10.0.0.2"]}}, "proxy.host: must be .* with several"),
        ({"proxy": {"port": 30001}}, "proxy.registration_port: must be another port"),
        ({"proxy": {"settings": {"MAX_QUEU": 1}}}, "proxy.settings.MAX_QUEU: is no setting of the proxy"),
        ({"proxy": {"settings": {"MAX_QUEUE": "many"}}}, "proxy.settings.MAX_QUEUE: must be"),
        ({"proxy": {"settings": {"API_KEY": "k"}}}, "proxy.settings.API_KEY: Ray shows this file"),
        ({"proxy": {"settings": {"PROXY_PORT": 1}}}, "proxy.settings.PROXY_PORT: is worked out"),
        ({"ports": {"http": "20000-20999"}}, "ports: must be a mapping"),
        ({"ports": {"http": "20000", "kv": "1-2"}}, "ports.http: must be a range"),
        ({"ports": {"http": "100-200", "kv": "200-300"}}, "ports.kv: must be a range that shares no port"),
        ({"settings": {"MODEL": "x"}}, "settings.MODEL: is no setting of engines"),
        ({"settings": {"MAX_MODEL_LEN": "long"}}, "settings.MAX_MODEL_LEN: "),
        ({"network": {"peers": ["10.0.0.1/8"]}}, "network.peers: must be a list of networks"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms: must be above 0"),
        ({"drain_timeout": -1}, "drain_timeout: must be a number from 0"),
    ],
)
def test_an_error_names_the_key(raw: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterFileError, match=words) as caught:
        settings.parse({**raw, **change})
    assert "\n" not in str(caught.value)


def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The parts whose replicas are replaced between two cluster files."""
    a, b = settings.parse(one), settings.parse(other)
    return {part for part in (*ROLES, "proxy") if settings.version(a, part) != settings.version(b, part)}


def test_numbers_of_engines_replace_no_replica(raw: dict[str, Any]) -> None:
    more = settings.scaled(raw, {"prefill": 3})
    assert settings.parse(more).prefill.count == 3 and "prefill" not in raw
    assert changed(more, raw) == set()


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        ({"prefill": {"args": ["--a"]}}, {"prefill"}),
        ({"decode": {"args": ["--a"]}}, {"decode"}),
        ({"proxy": {"settings": {"MAX_QUEUE": 1}}}, {"proxy"}),
        ({"proxy": {"nodes": ["10.0.0.1"]}}, {"prefill", "decode", "proxy"}),
        ({"model": "other"}, {"prefill", "decode", "proxy"}),
        ({"decode": {"autoscale": {"min": 1, "max": 2}}}, set()),
    ],
)
def test_a_change_replaces_what_it_concerns(raw: dict[str, Any], change: dict[str, Any], replaced: set[str]) -> None:
    assert changed({**raw, **change}, raw) == replaced


def test_a_role_that_scales_itself_is_not_scaled(raw: dict[str, Any]) -> None:
    with pytest.raises(ClusterFileError, match=r"decode.autoscale: sets the number"):
        settings.scaled({**raw, "decode": {"autoscale": {"min": 1, "max": 2}}}, {"decode": 2})
