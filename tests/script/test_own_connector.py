"""Which KV connector vLLM gets, and everything that differs with this project's own (docs/connector.md)."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from disagg_kv.engine import versions
from disagg_kv.settings import Settings
from tests.script.machine import REPOSITORY, Machine, wait_for
from tests.script.stubs import Stubs
from tests.script.told import FROZEN, REASON, Told, pids, restarted

IN_TREE = {"randomises": True, "switch": True}
REMOVED = {"connector": False, "randomises": True, "switch": True}
NAMES = {"own": "DisaggKVConnector", "p2p_nccl": "P2pNcclConnector"}


@pytest.fixture
def stubs(tmp_path: Path, machine: Machine) -> Stubs:
    made = Stubs(tmp_path / "stubs")
    made.nvidia_smi(2)
    machine.env |= {"PATH": made.path, "ENGINE": "vllm"}
    return made


def commands(machine: Machine, **changes: str) -> dict[str, list[str]]:
    """What `env` prints, by the name of the part."""
    lines = machine.ok("env", **changes).stdout.splitlines()
    return {lines[i][2:]: shlex.split(lines[i + 1]) for i in range(len(lines)) if lines[i].startswith("# ")}


def config_of(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(words[words.index("--kv-transfer-config") + 1])
    return found


@pytest.mark.parametrize(
    ("version", "facts", "setting", "chosen"),
    [
        ("0.9.2", {}, "auto", "p2p_nccl"),
        ("0.13.0", {}, "", "p2p_nccl"),
        ("0.18.0", IN_TREE, "auto", "p2p_nccl"),
        ("0.21.0", IN_TREE, "auto", "p2p_nccl"),
        ("0.23.1", IN_TREE, "auto", "p2p_nccl"),
        ("0.23.0", IN_TREE, "p2p_nccl", "p2p_nccl"),
        ("0.21.0", IN_TREE, "own", "own"),
        ("0.23.0", IN_TREE, "own", "own"),
        ("0.22.0", REMOVED, "auto", "own"),
        ("0.24.0", REMOVED, "auto", "own"),
        ("0.24.0", IN_TREE, "auto", "own"),
        ("0.33.0", REMOVED, "", "own"),
        ("0.33.0", REMOVED, "own", "own"),
        ("1.0.0", REMOVED, "auto", "own"),
    ],
)
def test_choice(
    machine: Machine, stubs: Stubs, version: str, facts: dict[str, bool], setting: str, chosen: str
) -> None:
    stubs.vllm(version, **facts)
    found = commands(machine, KV_CONNECTOR=setting)
    assert {config_of(found[role])["kv_connector"] for role in ("prefill", "decode")} == {NAMES[chosen]}


@pytest.mark.parametrize(("version", "chosen"), [("0.24.0", "own"), ("0.22.0", "p2p_nccl")])
def test_choice_for_a_vllm_whose_files_cannot_be_found(
    machine: Machine, stubs: Stubs, version: str, chosen: str
) -> None:
    stubs.vllm_that_only_tells_its_version(version)
    assert config_of(commands(machine)["decode"])["kv_connector"] == NAMES[chosen]


@pytest.mark.parametrize(
    ("version", "facts", "setting", "words"),
    [
        ("0.20.2", IN_TREE, "own", ["KV_CONNECTOR=own needs vLLM 0.21", '"vllm>=0.21"', "auto"]),
        ("0.9.2", {}, "own", ["KV_CONNECTOR=own needs vLLM 0.21", '"vllm>=0.21"', "auto"]),
        ("0.24.0", REMOVED, "p2p_nccl", ["removed in 0.24", "KV_CONNECTOR=own", '"vllm>=0.18,<0.24"']),
        ("0.33.0", REMOVED, "p2p_nccl", ["removed in 0.24", "KV_CONNECTOR=own", '"vllm>=0.18,<0.24"']),
        ("0.15.0", {"randomises": True}, "auto", ["request ids random", '"vllm>=0.21"']),
        ("0.15.0", {"randomises": True}, "p2p_nccl", ["request ids random", '"vllm>=0.21"']),
        ("0.15.0", {"randomises": True}, "own", ["KV_CONNECTOR=own needs vLLM 0.21", '"vllm>=0.21"']),
    ],
)
def test_refusals_and_their_remedies(
    machine: Machine, stubs: Stubs, version: str, facts: dict[str, bool], setting: str, words: list[str]
) -> None:
    stubs.vllm(version, **facts)
    machine.env["KV_CONNECTOR"] = setting
    for command in ("all", "decode", "env"):
        done = machine.run(command)
        assert done.returncode == 1
        assert all(word in done.stderr for word in [version, *words]), done.stderr
    doctor = machine.run("doctor")
    assert doctor.returncode == 1 and all(word in doctor.stdout for word in words)
    assert stubs.started() == [] and machine.leftovers() == {}


def test_no_such_connector(machine: Machine) -> None:
    done = machine.run("env", KV_CONNECTOR="nixl")
    assert done.returncode == 2 and "KV_CONNECTOR" in done.stderr and "own" in done.stderr


def expected_words(machine: Machine, role: str) -> list[str]:
    words = ["serve", "org/model", "--host", "127.0.0.1", "--port", machine.env[f"{role.upper()}_HTTP_PORT"]]
    words += ["--served-model-name", "model", "org/model", "--dtype", "auto", "--max-model-len", "10000"]
    words += ["--max-num-batched-tokens", "10000", "--max-num-seqs", "256", "--gpu-memory-utilization", "0.9"]
    return [*words, "--kv-transfer-config"]


def expected_config(machine: Machine, role: str) -> dict[str, Any]:
    upper = role.upper()
    config: dict[str, Any] = {
        "kv_connector": "DisaggKVConnector",
        "kv_connector_module_path": "disagg_kv.connector",
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "kv_port": int(machine.env[f"{upper}_KV_PORT"]),
        "kv_connector_extra_config": {
            "proxy_ip": "127.0.0.1",
            "proxy_port": int(machine.env["PROXY_PORT"]),
            "http_port": int(machine.env[f"{upper}_HTTP_PORT"]),
        },
    }
    return {**config, "kv_load_failure_policy": "recompute"} if role == "decode" else config


@pytest.mark.parametrize(("version", "facts", "setting"), [("0.33.0", REMOVED, "auto"), ("0.21.0", IN_TREE, "own")])
def test_commands_and_environment(
    machine: Machine, stubs: Stubs, version: str, facts: dict[str, bool], setting: str
) -> None:
    stubs.vllm(version, **facts)
    machine.env |= {"KV_CONNECTOR": setting, "PYTHONPATH": "/somewhere/else", "DISAGG_KV_SECRET": "a-secret"}
    up = machine.ok("all")
    assert f"vLLM {version} with this project's connector" in up.stderr
    started = {json.loads(r["argv"][-1])["kv_role"]: r for r in stubs.started()}
    assert len(stubs.started()) == len(started) == 2
    for role, kv_role, gpu in (("prefill", "kv_producer", "0"), ("decode", "kv_consumer", "1")):
        argv, env = started[kv_role]["argv"], started[kv_role]["env"]
        assert argv[:-1] == expected_words(machine, role)
        assert json.loads(argv[-1]) == expected_config(machine, role)
        Settings.load(json.loads(argv[-1])["kv_connector_extra_config"], env)  # the connector takes it
        assert env["CUDA_VISIBLE_DEVICES"] == gpu and env["VLLM_HOST_IP"] == "127.0.0.1"
        assert env["PYTHONPATH"].endswith(f":{REPOSITORY}:/somewhere/else")  # after the stub's own
        assert env["DISAGG_KV_SECRET"] == "a-secret"
        assert "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION" not in env and "VLLM_USE_V1" not in env
        assert machine.fields(role)["connector"] == "own"
    proxy = dict(
        word.split("=", 1)
        for word in Path(f"/proc/{machine.pid('proxy')}/environ").read_text().split("\0")
        if "=" in word
    )
    assert proxy["DISAGG_KV_SECRET"] == "a-secret"
    assert proxy["DECODE_MAX_IN_FLIGHT"] == "256"
    assert not {"KV_BUFFER_BYTES", "KV_BYTES_PER_TOKEN"} & set(proxy)
    assert "a-secret" not in "".join(path.read_text() for path in machine.run_dir.glob("*") if path.is_file())
    assert "a-secret" not in up.stdout + up.stderr + machine.ok("env").stdout + machine.ok("config").stdout


def test_secret_from_the_config_file_survives_a_restart(machine: Machine, stubs: Stubs, tmp_path: Path) -> None:
    stubs.vllm("0.33.0", **REMOVED)
    (tmp_path / "settings").write_text("DISAGG_KV_SECRET=from-a-file\n")
    machine.ok("all", CONFIG=str(tmp_path / "settings"))
    old = machine.pid("prefill")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: len(stubs.started()) == 3)
    assert [r["env"].get("DISAGG_KV_SECRET") for r in stubs.started()] == ["from-a-file"] * 3


def test_what_the_user_says_explicitly(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.33.0", **REMOVED)
    found = commands(
        machine,
        CHUNKED_PREFILL="off",
        ENFORCE_EAGER="1",
        DECODE_GPU_MEMORY_UTILIZATION="0.5",
        EXTRA_DECODE_ARGS="--no-enable-prefix-caching",
        KV_BUFFER_BYTES="5",
    )
    assert "--no-enable-chunked-prefill" in found["prefill"]
    assert "--no-enable-chunked-prefill" not in found["decode"]
    for role in ("prefill", "decode"):
        assert "--enforce-eager" in found[role]
    assert found["decode"][found["decode"].index("--gpu-memory-utilization") + 1] == "0.5"
    assert found["decode"][-1] == "--no-enable-prefix-caching"
    both = commands(machine, GPU_MEMORY_UTILIZATION="0.6")
    assert {both[role][both[role].index("--gpu-memory-utilization") + 1] for role in ("prefill", "decode")} == {"0.6"}


@pytest.mark.parametrize(
    ("setting", "eager"),
    [("", set()), ("auto", set()), ("0", set()), ("1", {"prefill", "decode"}), ("prefill", {"prefill"})],
)
def test_graphs_are_whole(machine: Machine, stubs: Stubs, setting: str, eager: set[str]) -> None:
    """Blocks are sent after the step: prefill needs no piecewise graphs."""
    stubs.vllm("0.33.0", **REMOVED)
    found = commands(machine, ENFORCE_EAGER=setting)
    assert {role for role in ("prefill", "decode") if "--enforce-eager" in found[role]} == eager
    assert "PIECEWISE" not in str(found)


def test_long_prompts_in_chunks_are_no_danger(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.33.0", **REMOVED)
    done = machine.run("doctor", MAX_NUM_BATCHED_TOKENS="4096", CHUNKED_PREFILL="on")
    assert "ends inside the last block" not in done.stdout and "request ids" not in done.stdout
    assert "vLLM 0.33.0 with this project's connector" in done.stdout


@pytest.mark.parametrize(
    ("host", "announced", "more"),
    [
        ("localhost", "127.0.0.1", {}),
        ("0.0.0.0", "127.0.0.1", {}),
        ("127.0.0.2", "127.0.0.2", {"listen": "127.0.0.2"}),
        ("::1", "::1", {"listen": "::1"}),
        ("192.0.2.7", "192.0.2.7", {"listen": "192.0.2.7", "peers": "192.0.2.7"}),
        ("2001:db8::7", "2001:db8::7", {"listen": "2001:db8::7", "peers": "2001:db8::7"}),
    ],
)
def test_where_it_listens(machine: Machine, stubs: Stubs, host: str, announced: str, more: dict[str, str]) -> None:
    """The connector itself stays on 127.0.0.1, whatever address it announces, unless it is told."""
    stubs.vllm("0.33.0", **REMOVED)
    for role, words in commands(machine, ENGINE_HOST=host).items():
        if role != "proxy":
            extra = config_of(words)["kv_connector_extra_config"]
            assert f"VLLM_HOST_IP={announced}" in words
            assert {name: extra[name] for name in ("listen", "peers") if name in extra} == more
            settings = Settings.load(extra, {})
            assert settings.may_fetch_from(f"[{announced}]:1" if ":" in announced else f"{announced}:1")


def test_ipv6_proxy(machine: Machine, stubs: Stubs) -> None:
    """The connector puts the brackets itself."""
    stubs.vllm("0.33.0", **REMOVED)
    assert config_of(commands(machine, PROXY_HOST="::")["decode"])["kv_connector_extra_config"]["proxy_ip"] == "::1"


def test_a_name_cannot_be_announced(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.33.0", **REMOVED)
    done = machine.run("all", ENGINE_HOST="my-host")
    assert done.returncode == 1 and "ENGINE_HOST=my-host" in done.stderr and "IP address" in done.stderr


def test_doctor(machine: Machine, stubs: Stubs) -> None:
    """No KV buffer and no pinned pool; staging buffers, and a secret where others can reach the ports."""
    stubs.vllm("0.33.0", **REMOVED)
    found = machine.run("doctor", KV_BUFFER_SIZE="9e11", MEM_POOL_SIZE_GB="100000").stdout
    assert "KV buffer" not in found and "pinned" not in found and "secret" not in found.lower()
    staging = Settings.staging_mb * Settings.staging_buffers
    for name, gpu in (("prefill", 0), ("decode", 1)):
        assert (
            f"[ok] staging buffers of {name} on GPU {gpu}: 8156 MiB beside vLLM's share, {1024 + staging} MiB" in found
        )
    tight = machine.run("doctor", DECODE_GPU_MEMORY_UTILIZATION="0.99").stdout
    assert "[warning] staging buffers of decode on GPU 1" in tight
    assert "[warning] KV ports are open on 192.0.2.7" in machine.run("doctor", ENGINE_HOST="192.0.2.7").stdout
    told = machine.run("doctor", ENGINE_HOST="192.0.2.7", DISAGG_KV_SECRET="x").stdout
    assert "[ok] KV ports" in told and "open on" not in told


@pytest.mark.parametrize(("minor", "warned"), [(versions.NEWEST[1], False), (versions.NEWEST[1] + 1, True)])
def test_a_vllm_that_nobody_has_tried(machine: Machine, stubs: Stubs, minor: int, warned: bool) -> None:
    stubs.vllm(f"0.{minor}.0", **REMOVED)
    words = f"vLLM 0.{versions.OLDEST[1]} to 0.{versions.NEWEST[1]}"
    assert (words in machine.run("doctor").stdout) is warned
    assert (words in machine.ok("all").stderr) is warned


def test_oldest_version_is_the_connectors_own(machine: Machine, stubs: Stubs) -> None:
    """What the script lets through, the connector takes."""
    oldest = versions.OLDEST[1]
    stubs.vllm(f"0.{oldest}.0", **IN_TREE)
    commands(machine, KV_CONNECTOR="own")
    versions.check_version(f"0.{oldest}.0")
    with pytest.raises(ValueError, match="too old"):
        versions.check_version(f"0.{oldest - 1}.9")


def test_requirements_install_what_the_script_takes() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    allowed = next(Requirement(line) for line in lines if line.startswith("vllm")).specifier
    refused = ["0.8.5", "0.9.1", "0.14.0", "0.14.1", "0.15.0", "0.16.2"]
    taken = ["0.9.2", "0.13.0", "0.17.0", "0.23.0", "0.24.0", f"0.{versions.NEWEST[1]}.0"]
    assert list(allowed.filter(refused + taken)) == taken


@pytest.fixture
def told(machine: Machine, stubs: Stubs, tmp_path: Path) -> Told:
    stubs.vllm("0.33.0", **REMOVED)
    return Told(machine, tmp_path / "told")


def test_a_decode_that_dies_leaves_its_prefills_alone(machine: Machine, told: Told) -> None:
    """They have sent to it, and connect anew."""
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    os.kill(old["decode"], signal.SIGKILL)
    wait_for(lambda: restarted(machine, decode=old["decode"]))
    told.wait_for_no_effect()
    assert {**pids(machine), "decode": old["decode"]} == old
    assert "sent KV" not in machine.log("supervisor")
    assert machine.fields("decode")["connector"] == "own"


def test_a_frozen_decode_leaves_its_prefills_alone(machine: Machine, told: Told) -> None:
    machine.ok("all")
    told.wait_for_content()
    old = pids(machine)
    os.kill(old["decode"], signal.SIGSTOP)
    told.says(decode=FROZEN)
    wait_for(lambda: restarted(machine, decode=old["decode"]))
    told.wait_for_no_effect()
    assert {**pids(machine), "decode": old["decode"]} == old
    log = machine.log("supervisor")
    assert f"is frozen, says the proxy ({REASON}), and is ended" in log and "sent KV" not in log


@pytest.mark.parametrize(("setting", "partners"), [("own", False), ("p2p_nccl", True)])
def test_restart_and_stop_of_a_decode(
    machine: Machine, stubs: Stubs, tmp_path: Path, setting: str, partners: bool
) -> None:
    """The same with both connectors on the same vLLM."""
    stubs.vllm("0.23.0", **IN_TREE)
    Told(machine, tmp_path / "told")
    machine.ok("all", "--no-supervise", KV_CONNECTOR=setting)
    old = pids(machine)
    said = machine.ok("restart", "decode").stderr
    new = pids(machine)
    assert new["decode"] != old["decode"] and new["proxy"] == old["proxy"]
    assert (new["prefill"] != old["prefill"]) is partners
    assert ("would stay frozen" in said) is partners
    assert ("must be restarted with it" in machine.ok("stop", "decode").stderr) is partners
