"""Command lines and environments of a cluster's processes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from disagg_kv.settings import Settings
from disagg_machine.commands import Command
from disagg_machine.vllm_facts import VllmFacts
from disagg_ray import commands, keys
from disagg_ray.commands import Node
from disagg_ray.settings import Cluster, Network, Proxy, Role
from disagg_sim import cli as sim

NODE = Node("10.0.0.2", "the shared secret", "/etc/secret", ("10.0.0.1", "10.0.0.9"))
FACTS = VllmFacts("0.32.0", command=("/opt/vllm/bin/python", "-m", "vllm"), python="/opt/vllm/bin/python")


def engine(cluster: Cluster, role: str, vllm: VllmFacts | None, gpus: str = "") -> Command:
    return commands.engine(
        cluster, NODE, role, 20000, 21000, python="python",
        environ={"CUDA_VISIBLE_DEVICES": gpus}, vllm=vllm,
    )  # fmt: skip


def test_a_simulated_engine_announces_itself_to_all_proxies(cluster: Cluster) -> None:
    command = engine(cluster, "decode", None)
    assert command.words[:3] == ("python", "-m", "disagg_sim")
    (config,) = sim._configs(sim._parser(), sim._parser().parse_args(command.words[3:]))
    assert (config.role, config.connector, config.host, config.port, config.kv_port) == (
        "decode", "disagg_kv", "10.0.0.2", 20000, 21000,
    )  # fmt: skip
    assert config.proxy == "10.0.0.1:30001,10.0.0.9:30001" and config.models == ("Qwen3-4B",)


def test_a_vllm_engine_gets_a_configuration_that_the_connector_accepts(cluster: Cluster, tmp_path: object) -> None:
    cluster = replace(
        cluster,
        engine="vllm",
        prefill=Role(tensor_parallel=2, args=("--max-num-seqs", "8")),
        network=Network(("10.0.0.0/8",), {"NCCL_SOCKET_IFNAME": "eth0"}),
        environment={"HF_HOME": "/models/hf"},
    )
    command = engine(cluster, "prefill", FACTS, "3,5")
    words = command.words
    config = json.loads(words[words.index("--kv-transfer-config") + 1])
    loaded = Settings.load(config["kv_connector_extra_config"], {})
    assert loaded.announce_to == ("10.0.0.1:30001", "10.0.0.9:30001")
    assert loaded.listen == loaded.host_ip == "10.0.0.2" and loaded.peers == ("10.0.0.0/8",)
    assert config["kv_port"] == 21000 and loaded.http_port == 20000
    assert words[-2:] == ("--max-num-seqs", "8")
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[words.index("--distributed-executor-backend") + 1] == "mp"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert command.environment["NCCL_SOCKET_IFNAME"] == "eth0" and command.environment["HF_HOME"] == "/models/hf"


def test_no_secret_is_in_a_command_line(cluster: Cluster) -> None:
    for command in (
        engine(cluster, "prefill", None),
        engine(replace(cluster, engine="vllm"), "decode", FACTS, "0"),
        commands.proxy(cluster, NODE, "python"),
    ):
        line = " ".join(command.words)
        assert NODE.secret not in line and keys.derived(NODE.secret, keys.ENGINE) not in line


def test_engines_and_proxy_have_the_same_key(cluster: Cluster) -> None:
    proxy = commands.proxy(cluster, NODE, "python").environment
    assert proxy["ENGINE_API_KEY"] == engine(cluster, "prefill", None).environment["VLLM_API_KEY"]
    assert proxy["ALLOW_REGISTER"] == "proven" and proxy["DISAGG_KV_SECRET_FILE"] == "/etc/secret"
    assert len({proxy["ENGINE_API_KEY"], proxy["ADMIN_KEY"], NODE.secret}) == 3
    assert "API_KEY" not in proxy


def test_where_clients_have_keys_statistics_need_one_too(cluster: Cluster) -> None:
    cluster = replace(cluster, proxy=Proxy(settings={"API_KEYS_FILE": "/etc/keys.toml"}))
    proxy = commands.proxy(cluster, NODE, "python").environment
    assert proxy["API_KEY"] == keys.derived(NODE.secret, keys.MONITORING)


@pytest.mark.parametrize(("proxies", "part"), [(1, "64"), (2, "32"), (100, "1")])
def test_proxies_share_the_limits(cluster: Cluster, proxies: int, part: str) -> None:
    hosts = tuple(f"10.0.1.{n}" for n in range(1, proxies + 1))
    cluster = replace(cluster, settings={"MAX_NUM_SEQS": "64"}, proxy=Proxy(settings={"MAX_IN_FLIGHT": "0"}))
    proxy = commands.proxy(cluster, replace(NODE, proxies=hosts), "python").environment
    assert proxy["DECODE_MAX_IN_FLIGHT"] == part
    assert proxy["MAX_IN_FLIGHT"] == "0", "no limit"


def test_the_proxies_addresses(cluster: Cluster) -> None:
    assert commands.proxy_addresses(cluster, NODE.proxies) == ("10.0.0.1:10001", "10.0.0.9:10001")
    cluster = replace(cluster, proxy=Proxy(host="fd00::1"))
    assert commands.proxy_addresses(cluster, ["10.0.0.1"]) == ("[fd00::1]:10001",)


def test_processes_get_nothing_of_rays_environment() -> None:
    given = {"RAY_ADDRESS": "x", "HOME": "/root", "no_proxy": "internal", "PYTHONPATH": "/a"}
    made = commands.environment(Command(("x",), {"A": "1"}), given, ["10.0.0.2"], "/project")
    assert made["no_proxy"] == made["NO_PROXY"] == "internal,127.0.0.1,localhost,::1,10.0.0.2"
    assert made["PYTHONPATH"] == "/project:/a" and made["A"] == "1" and "RAY_ADDRESS" not in made
