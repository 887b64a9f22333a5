"""The exact command line and environment of every process.

What the flags must be was read in vllm/engine/arg_utils.py of 0.9.2 to 0.33.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest

from disagg_machine import commands
from disagg_machine.engines import SIM, VLLM, Engines
from disagg_machine.layout import Place
from disagg_machine.messages import MachineError
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts
from tests.machine.conftest import MakeContext

PREFILL = Place("prefill", "prefill", 20003, 21001, ("0",))
DECODE = Place("decode", "decode", 20005, 22001, ("1",))
PLAIN = Place("plain1", "plain", 20004, None, ("2", "3"))
FACTS = VllmFacts("0.33.0")


def own(settings: Settings, place: Place, version: str = "0.33.0", **environ: str) -> commands.Command:
    engines = Engines(VLLM, vllm=VllmFacts(version), connector="own")
    return commands.engine(settings, engines, place, "python", "/the checkout", environ)


def p2p(settings: Settings, place: Place, version: str = "0.21.0") -> commands.Command:
    return commands.engine(settings, Engines(VLLM, vllm=VllmFacts(version)), place, "python", "/root", {})


def config_of(command: commands.Command) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command.words[command.words.index("--kv-transfer-config") + 1])
    return found


SERVE = (
    "vllm serve org/model --host 127.0.0.1 --port {port} --served-model-name model org/model --dtype auto "
    "--max-model-len 10000 --max-num-batched-tokens 10000 --max-num-seqs 256 --gpu-memory-utilization {share}"
)


def test_prefill_with_this_projects_connector(make_context: MakeContext) -> None:
    assert own(make_context().settings, PREFILL).line() == (
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0 VLLM_HOST_IP=127.0.0.1 PYTHONPATH='/the checkout' "
        + SERVE.format(port=20003, share="0.9")
        + ' --kv-transfer-config \'{"kv_connector":"DisaggKVConnector",'
        '"kv_connector_module_path":"disagg_kv.connector","kv_role":"kv_producer","kv_port":21001,'
        '"kv_connector_extra_config":{"proxy_ip":"127.0.0.1","proxy_port":30001,"http_port":20003}}\''
    )


def test_decode_with_this_projects_connector(make_context: MakeContext) -> None:
    command = own(make_context().settings, DECODE, PYTHONPATH="/mine")
    assert command.words[:-2] == tuple(SERVE.format(port=20005, share="0.9").split())
    assert command.environment["PYTHONPATH"] == "/the checkout:/mine"
    config = config_of(command)
    assert config["kv_role"] == "kv_consumer" and config["kv_load_failure_policy"] == "recompute"


def test_decode_with_p2p_nccl(make_context: MakeContext) -> None:
    assert p2p(make_context().settings, DECODE).line() == (
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1 VLLM_HOST_IP=127.0.0.1 "
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1 "
        + SERVE.format(port=20005, share="0.7")
        + " --enforce-eager --no-enable-prefix-caching --kv-transfer-config "
        '\'{"kv_connector":"P2pNcclConnector","kv_role":"kv_consumer","kv_buffer_size":"8e9","kv_port":"22001",'
        '"kv_connector_extra_config":{"proxy_ip":"127.0.0.1","proxy_port":"30001","http_port":"20005",'
        '"send_type":"PUT_ASYNC","nccl_num_channels":"16","mem_pool_size_gb":"4"}}\''
    )


def test_prefill_with_p2p_nccl_wants_no_buffer(make_context: MakeContext) -> None:
    config = config_of(p2p(make_context().settings, PREFILL))
    assert config["kv_buffer_size"] == "1e1" and config["kv_connector_extra_config"]["mem_pool_size_gb"] == "1"


@pytest.mark.parametrize(
    ("version", "flags", "variables"),
    [
        ("0.9.2", ["--enforce-eager", "--disable-log-requests"], {"VLLM_USE_V1": "1"}),
        ("0.10.1", ["--enforce-eager"], {"VLLM_USE_V1": "1"}),
        ("0.13.0", ["--enforce-eager"], {}),
        ("0.14.0", ["--enforce-eager", "--no-enable-chunked-prefill"], {}),
        ("0.23.0", ["--enforce-eager", "--no-enable-chunked-prefill"], {}),
    ],
)
def test_p2p_nccl_by_version(
    make_context: MakeContext, version: str, flags: list[str], variables: dict[str, str]
) -> None:
    command = p2p(make_context().settings, PREFILL, version)
    assert list(command.words[len(SERVE.split()) : -2]) == flags
    known = {"CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "VLLM_HOST_IP", "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"}
    assert {name: value for name, value in command.environment.items() if name not in known} == variables


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("auto", {"p2p prefill": "eager", "p2p decode": "eager", "own prefill": "", "own decode": ""}),
        ("1", dict.fromkeys(("p2p prefill", "p2p decode", "own prefill", "own decode"), "eager")),
        ("0", {"p2p prefill": "piecewise", "p2p decode": "", "own prefill": "", "own decode": ""}),
        ("prefill", {"p2p prefill": "eager", "p2p decode": "", "own prefill": "eager", "own decode": ""}),
    ],
)
def test_cuda_graphs(make_context: MakeContext, setting: str, expected: dict[str, str]) -> None:
    settings = make_context(ENFORCE_EAGER=setting).settings
    found = {}
    for name, make in (("p2p", p2p), ("own", own)):
        for place in (PREFILL, DECODE):
            words = make(settings, place).words
            piecewise = '{"cudagraph_mode":"PIECEWISE"}' in words
            found[f"{name} {place.role}"] = "eager" if "--enforce-eager" in words else "piecewise" if piecewise else ""
    assert found == expected


@pytest.mark.parametrize(
    ("setting", "batched", "version", "chunked"),
    [
        ("auto", "10000", "0.21.0", False),
        ("auto", "8192", "0.21.0", True),
        ("auto", "10000", "0.13.0", True),
        ("off", "8192", "0.14.0", False),
        ("off", "8192", "0.13.0", True),
        ("on", "10000", "0.21.0", True),
    ],
)
def test_chunks_with_p2p_nccl(
    make_context: MakeContext, setting: str, batched: str, version: str, chunked: bool
) -> None:
    settings = make_context(CHUNKED_PREFILL=setting, MAX_NUM_BATCHED_TOKENS=batched).settings
    facts = VllmFacts(version)
    assert commands.chunked_prefill(settings, facts) is chunked
    assert ("--no-enable-chunked-prefill" in p2p(settings, PREFILL, version).words) is not chunked
    assert commands.chunks_may_kill(settings, Engines(VLLM, vllm=facts)) is chunked
    assert not commands.chunks_may_kill(settings, Engines(VLLM, vllm=facts, connector="own"))
    assert not commands.chunks_may_kill(settings, Engines(SIM))


def test_extra_arguments_come_last_and_tensor_parallel_is_the_gpus(make_context: MakeContext) -> None:
    settings = make_context(EXTRA_DECODE_ARGS="--a '{\"b\": 1}'", EXTRA_PREFILL_ARGS="--c").settings
    assert own(settings, DECODE).words[-2:] == ("--a", '{"b": 1}')
    wide = own(settings, replace(PREFILL, gpus=("0", "GPU-1")))
    assert wide.words[-1] == "--c" and wide.environment["CUDA_VISIBLE_DEVICES"] == "0,GPU-1"
    assert wide.words[wide.words.index("--tensor-parallel-size") + 1] == "2"


def test_an_open_quote_is_named(make_context: MakeContext) -> None:
    with pytest.raises(MachineError) as refused:
        own(make_context(EXTRA_DECODE_ARGS="--a 'b").settings, DECODE)
    assert refused.value.code == 2 and "--a 'b" in str(refused.value)


@pytest.mark.parametrize(
    ("host", "more"),
    [
        ("127.0.0.2", {"listen": "127.0.0.2"}),
        ("::1", {"listen": "::1"}),
        ("192.0.2.7", {"listen": "192.0.2.7", "peers": "192.0.2.7"}),
        ("localhost", {}),
        ("0.0.0.0", {}),
    ],
)
def test_where_this_projects_connector_listens(make_context: MakeContext, host: str, more: dict[str, str]) -> None:
    extra = config_of(own(make_context(ENGINE_HOST=host).settings, DECODE))["kv_connector_extra_config"]
    assert {name: extra[name] for name in ("listen", "peers") if name in extra} == more


@pytest.mark.parametrize(("host", "own_ip", "p2p_ip"), [("::", "::1", "[::1]"), ("0.0.0.0", "127.0.0.1", "127.0.0.1")])
def test_the_proxys_address(make_context: MakeContext, host: str, own_ip: str, p2p_ip: str) -> None:
    """P2pNcclConnector puts no brackets around an IPv6 address."""
    settings = make_context(PROXY_HOST=host).settings
    assert config_of(own(settings, DECODE))["kv_connector_extra_config"]["proxy_ip"] == own_ip
    assert config_of(p2p(settings, DECODE))["kv_connector_extra_config"]["proxy_ip"] == p2p_ip


def test_a_plain_engine(make_context: MakeContext) -> None:
    settings = make_context(EXTRA_PLAIN_ARGS="--more", ENFORCE_EAGER="1").settings
    command = own(settings, PLAIN)
    assert command.environment == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_PORT": "41064",
    }
    assert command.words[-4:] == ("--tensor-parallel-size", "2", "--enforce-eager", "--more")
    assert "VLLM_PORT" not in own(settings, PLAIN, VLLM_PORT="5").environment


def test_simulated_engines(make_context: MakeContext) -> None:
    settings = make_context(EXTRA_SIM_ARGS="--ping-seconds 1", ENGINE_API_KEY="k", PROXY_HOST="::").settings
    line = commands.engine(settings, Engines(SIM), DECODE, "python", "/root", {}).line()
    assert line == (
        "python -m disagg_sim --role decode --host 127.0.0.1 --port 20005 --kv-port 22001 --proxy '[::1]:30001' "
        "--max-model-len 10000 --max-num-seqs 256 --max-num-batched-tokens 10000 --kv-buffer-bytes 8000000000 "
        "--kv-pool-bytes 4294967296 --gpu 1 --model model --model org/model --ping-seconds 1"
    )
    plain = commands.simulated(settings, PLAIN, "python").words
    assert plain[3:7] == ("--role", "decode", "--connector", "disagg_kv") and "--proxy" not in plain


def test_the_proxy(make_context: MakeContext) -> None:
    settings = make_context(API_KEY="secret", EXTRA_PROXY_ARGS="--log-level debug", STOP_TIMEOUT="9").settings
    command = commands.proxy(
        settings, Engines(VLLM, vllm=FACTS), ["python", "server.py"], tensor_parallel=2, kv_bytes_per_token=7
    )
    assert command.line() == (
        "HTTP_PROXY_HOST=0.0.0.0 HTTP_PROXY_PORT=10001 PROXY_HOST=127.0.0.1 PROXY_PORT=30001 SHUTDOWN_GRACE=6 "
        "DECODE_MAX_IN_FLIGHT=256 KV_BUFFER_BYTES=16000000000 KV_BYTES_PER_TOKEN=7 "
        "python server.py --log-level debug"
    )


def test_the_proxy_before_this_projects_connector_has_no_kv_buffer(make_context: MakeContext) -> None:
    engines = Engines(VLLM, vllm=FACTS, connector="own")
    command = commands.proxy(make_context(STOP_TIMEOUT="2").settings, engines, ["p"], environ={"KV_BUFFER_BYTES": "5"})
    assert set(command.environment) & {"KV_BUFFER_BYTES", "KV_BYTES_PER_TOKEN"} == set()
    assert command.environment["SHUTDOWN_GRACE"] == "1"


def test_what_the_user_has_set_for_the_proxy_wins(make_context: MakeContext) -> None:
    names = ("SHUTDOWN_GRACE", "DECODE_MAX_IN_FLIGHT", "KV_BUFFER_BYTES", "KV_BYTES_PER_TOKEN")
    mine = dict.fromkeys(names, "3")
    command = commands.proxy(make_context().settings, Engines(SIM), ["p"], environ=mine)
    assert {name: command.environment[name] for name in names} == mine


def test_the_proxy_reads_the_gpus_of_engines_that_do_not_announce_them(make_context: MakeContext) -> None:
    settings = make_context().settings
    places = [Place("proxy", "proxy", 10001), Place("prefill", "prefill", 20003, 21001, ("0", "1")),
              Place("decode", "decode", 20005, 22001, ("GPU-1234",))]  # fmt: skip

    def gpus(engines: Engines, **environ: str) -> str | None:
        return commands.proxy(settings, engines, ["p"], environ=environ, places=places).environment.get("POWER_GPUS")

    assert gpus(Engines(VLLM, vllm=FACTS)) == "127.0.0.1:20003=0+1,127.0.0.1:20005=GPU-1234"
    assert gpus(Engines(VLLM, vllm=FACTS), POWER_GPUS="mine") == "mine"
    assert gpus(Engines(VLLM, vllm=FACTS, connector="own")) is gpus(Engines(SIM)) is None


def test_the_proxys_own_file_is_passed_on(make_context: MakeContext) -> None:
    command = commands.proxy(make_context(CONFIG_FILE="/etc/proxy.toml").settings, Engines(SIM), ["p"])
    assert command.environment["CONFIG_FILE"] == "/etc/proxy.toml"
    assert "CONFIG_FILE" not in commands.proxy(make_context().settings, Engines(SIM), ["p"]).environment


def test_a_line_can_be_pasted_into_a_shell() -> None:
    command = commands.Command(("a b", "it's", "", "x=1"), {"NAME": "two words"})
    assert shlex.split(command.line()) == ["NAME=two words", "a b", "it's", "", "x=1"]
