"""The exact `vllm serve` commands and environments with P2pNcclConnector, and the versions that are refused.

What the flags must be was read in vllm/engine/arg_utils.py of 0.9.2, 0.21.0 and 0.23.0.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.script.machine import Machine
from tests.script.stubs import Stubs, write_program

VERSIONS = {
    "0.9.2": {},
    "0.11.0": {},
    "0.21.0": {"randomises": True, "switch": True},
    "0.23.0": {"randomises": True, "switch": True},
}


@pytest.fixture
def stubs(tmp_path: Path, machine: Machine) -> Stubs:
    made = Stubs(tmp_path / "stubs")
    machine.env |= {"PATH": made.path, "ENGINE": "vllm"}
    return made


def transfer(machine: Machine, role: str) -> dict[str, Any]:
    kv = {"prefill": ("kv_producer", "1e1", "1"), "decode": ("kv_consumer", "8e9", "4")}[role]
    upper = role.upper()
    return {
        "kv_connector": "P2pNcclConnector",
        "kv_role": kv[0],
        "kv_buffer_size": kv[1],
        "kv_port": machine.env[f"{upper}_KV_PORT"],
        "kv_connector_extra_config": {
            "proxy_ip": "127.0.0.1",
            "proxy_port": machine.env["PROXY_PORT"],
            "http_port": machine.env[f"{upper}_HTTP_PORT"],
            "send_type": "PUT_ASYNC",
            "nccl_num_channels": "16",
            "mem_pool_size_gb": kv[2],
        },
    }


def expected(machine: Machine, role: str, version: str) -> list[str]:
    words = ["serve", "org/model", "--host", "127.0.0.1", "--port", machine.env[f"{role.upper()}_HTTP_PORT"]]
    words += ["--served-model-name", "model", "org/model", "--dtype", "auto", "--max-model-len", "10000"]
    words += ["--max-num-batched-tokens", "10000", "--max-num-seqs", "256", "--gpu-memory-utilization"]
    words += ["0.9" if role == "prefill" else "0.7", "--enforce-eager"]
    if version == "0.9.2":
        words += ["--disable-log-requests"]
    if role == "decode":
        words += ["--no-enable-prefix-caching"]
    elif version in ("0.21.0", "0.23.0"):
        words += ["--no-enable-chunked-prefill"]
    return [*words, "--kv-transfer-config"]


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_and_environment(machine: Machine, stubs: Stubs, version: str) -> None:
    stubs.vllm(version, **VERSIONS[version])
    stubs.nvidia_smi(2)
    machine.env["HF_HUB_OFFLINE"] = "1"
    up = machine.ok("all")
    assert f"vLLM {version}" in up.stderr and "SIMULATED" not in up.stderr
    started = {json.loads(r["argv"][-1])["kv_role"]: r for r in stubs.started()}
    assert len(stubs.started()) == len(started) == 2
    for role, kv_role, gpu in (("prefill", "kv_producer", "0"), ("decode", "kv_consumer", "1")):
        argv, env = started[kv_role]["argv"], started[kv_role]["env"]
        assert argv[:-1] == expected(machine, role, version)
        assert json.loads(argv[-1]) == transfer(machine, role)
        assert env["CUDA_VISIBLE_DEVICES"] == gpu and env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert env["VLLM_HOST_IP"] == "127.0.0.1"
        assert env["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] == "1"
        assert env.get("VLLM_USE_V1") == ("1" if version == "0.9.2" else None)
        assert env["HF_HUB_OFFLINE"] == "1"
        assert "127.0.0.1" in env["no_proxy"]
    machine.ok("test")
    status = machine.ok("status").stdout
    assert "vllm" in status and "GPU 0  NVIDIA Stub 0  559 / 81559 MiB" in status
    bench = machine.ok("bench", "--once", BENCH_REQUESTS="7").stdout
    assert bench.startswith(f"stub vllm bench serve --base-url {machine.url} --endpoint /v1/completions --model model")
    assert "--tokenizer org/model" in bench and "--num-prompts 7" in bench


def test_env_prints_what_all_starts(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(2)
    lines = machine.ok("env").stdout.splitlines()
    printed = shlex.split(lines[lines.index("# decode") + 1])
    assert printed[:2] == ["CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=1"]
    program = printed.index(str(stubs.bin / "vllm"))
    assert printed[program + 1 : -1] == expected(machine, "decode", "0.21.0")
    assert json.loads(printed[-1]) == transfer(machine, "decode")


def test_env_without_vllm_or_gpus(machine: Machine) -> None:
    done = machine.ok("env", ENGINE="vllm", PATH="/usr/bin:/bin")
    assert "vllm serve" in done.stdout and "No vLLM found" in done.stderr


@pytest.mark.parametrize(
    ("version", "facts", "words"),
    [
        ("0.14.0", {"randomises": True}, "vllm>=0.21"),
        ("0.16.0", {"randomises": True}, "vllm>=0.21"),
        ("0.8.5", {"connector": False}, "vllm>=0.21"),
        ("0.9.1", {}, "vllm>=0.21"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "auto"])
def test_refused_before_anything_starts(
    machine: Machine, stubs: Stubs, version: str, facts: dict[str, bool], words: str, engine: str
) -> None:
    stubs.vllm(version, **facts)
    stubs.nvidia_smi(2)
    for command in ("all", "decode"):
        done = machine.run(command, ENGINE=engine)
        assert done.returncode == 1
        assert version in done.stderr and words in done.stderr
    assert stubs.started() == [] and machine.leftovers() == {}
    assert not (machine.log_dir / "proxy.log").exists()
    doctor = machine.run("doctor", ENGINE=engine)
    assert doctor.returncode == 1 and words in doctor.stdout


@pytest.mark.parametrize(("version", "refused"), [("0.24.0", False), ("0.14.1", True), ("0.22.0", False)])
def test_a_vllm_whose_files_cannot_be_found(machine: Machine, stubs: Stubs, version: str, refused: bool) -> None:
    stubs.vllm_that_only_tells_its_version(version)
    assert (machine.run("env").returncode == 1) is refused


def test_long_shebang_form_of_pip_and_uv(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.23.0", **VERSIONS["0.23.0"])
    python = stubs.folder / "own/python3"
    write_program(stubs.bin / "vllm", f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nraise SystemExit(1)\n")
    stubs.nvidia_smi(2)
    assert "--no-enable-chunked-prefill" in machine.ok("env").stdout


def test_vllm_of_the_given_python(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    (stubs.bin / "vllm").unlink()
    python = stubs.folder / "own/python3"
    assert f"{python} -m vllm.entrypoints.cli.main serve" in machine.ok("env", PYTHON=str(python)).stdout


@pytest.mark.parametrize(("engine", "status"), [("auto", 0), ("vllm", 1)])
@pytest.mark.parametrize("lack", ["gpu", "vllm"])
def test_what_is_missing(machine: Machine, stubs: Stubs, engine: str, status: int, lack: str) -> None:
    if lack == "gpu":
        stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(0 if lack == "gpu" else 2)
    words = {"gpu": {0: "0 GPU(s) found", 1: "nvidia-smi shows 0"}, "vllm": {0: "no vLLM found", 1: "no vLLM found"}}
    clean_path = ":".join(p for p in machine.env["PATH"].split(":") if lack == "gpu" or not (Path(p) / "vllm").exists())
    done = machine.run("prefill", ENGINE=engine, PATH=clean_path, EXTRA_SIM_ARGS="--no-such-flag")
    assert words[lack][status] in done.stderr
    assert ("SIMULATED" in done.stderr) is (status == 0)
    assert done.returncode == 1


def test_several_engines_and_tensor_parallel(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(8)
    lines = machine.ok("env", PREFILL_GPUS="0+1,2+3", DECODE_GPUS="4+5,GPU-0006-aaaa+7").stdout.splitlines()
    commands = {lines[i][2:]: shlex.split(lines[i + 1]) for i in range(len(lines)) if lines[i].startswith("# ")}
    assert list(commands) == ["proxy", "prefill1", "prefill2", "decode1", "decode2"]
    gpus = ["0,1", "2,3", "4,5", "GPU-0006-aaaa,7"]
    assert [commands[name][1] for name in list(commands)[1:]] == [f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in gpus]
    kv = {name: int(json.loads(words[-1])["kv_port"]) for name, words in commands.items() if name != "proxy"}
    base = {role: int(machine.env[f"{role}_KV_PORT"]) for role in ("PREFILL", "DECODE")}
    assert kv == {
        "prefill1": base["PREFILL"],
        "prefill2": base["PREFILL"] + 2,
        "decode1": base["DECODE"],
        "decode2": base["DECODE"] + 2,
    }
    assert all("--tensor-parallel-size 2" in " ".join(words) for name, words in commands.items() if name != "proxy")
    wide = machine.ok("env", TENSOR_PARALLEL="2").stdout
    assert "CUDA_VISIBLE_DEVICES=0,1 " in wide and "CUDA_VISIBLE_DEVICES=2,3 " in wide


def test_ports_of_further_engines_go_round_what_is_taken(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    ports = {"PREFILL_HTTP_PORT": "20003", "DECODE_HTTP_PORT": "20005", "PREFILL_GPUS": "0,1,2,3"}
    machine.env |= ports
    found = machine.ok("env", DECODE_GPUS="4,5").stdout
    assert [p for p in range(20003, 20012) if f"--port {p} " in found] == [20003, 20004, 20005, 20006, 20007, 20008]
    order = [found.index(f"--port {p} ") for p in (20003, 20004, 20006, 20007, 20005, 20008)]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"DECODE_GPU": "5"}, 1, "GPU 5"),
        ({"DECODE_GPU": "0"}, 1, "NCCL"),
        ({"PREFILL_GPU": "GPU-0001-aaaa", "DECODE_GPU": "1"}, 1, "NCCL"),
        ({"PREFILL_GPUS": "0+1", "DECODE_GPUS": "2"}, 2, "tensor parallel"),
        ({"PREFILL_GPU": "0+1", "TENSOR_PARALLEL": "3"}, 2, "TENSOR_PARALLEL"),
    ],
)
def test_gpus_that_do_not_go(machine: Machine, stubs: Stubs, changes: dict[str, str], status: int, words: str) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(4)
    machine.env |= changes
    done = machine.run("all")
    assert done.returncode == status and words in done.stderr
    assert stubs.started() == []


def test_only_the_gpus_this_user_may_use(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(4)
    chosen = machine.ok("env", ENGINE="auto", CUDA_VISIBLE_DEVICES="1,GPU-0003").stdout
    assert "CUDA_VISIBLE_DEVICES=1 " in chosen and "CUDA_VISIBLE_DEVICES=GPU-0003 " in chosen
    one = {"ENGINE": "auto", "CUDA_VISIBLE_DEVICES": "2"}
    assert machine.ok("env", **one).stdout.count("CUDA_VISIBLE_DEVICES=2 ") == 2
    assert "disagg_sim" in machine.ok("env", **one, ALLOW_SHARED_GPU="0").stdout
    done = machine.run("all", CUDA_VISIBLE_DEVICES="1,2", DECODE_GPU="3")
    assert done.returncode == 1 and "GPU 3" in done.stderr


def test_engines_on_one_gpu_start_one_after_the_other(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    stubs.nvidia_smi(2)
    machine.ok("all", PREFILL_GPUS="0,0", DECODE_GPUS="1", STUB_STARTUP="1")
    producers = [r for r in stubs.started() if json.loads(r["argv"][-1])["kv_role"] == "kv_producer"]
    assert len(producers) == 2
    assert producers[1]["time"] - producers[0]["time"] >= 1


def test_one_gpu_serves_prefill_and_decode_that_start_together(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.33.0", randomises=True, switch=True, connector=False)
    stubs.nvidia_smi(1)
    done = machine.ok("all", STUB_STARTUP="1", KV_CONNECTOR="own")
    assert "share GPU 0, with 8155 MiB of KV cache each" in done.stderr + done.stdout
    started = stubs.started()
    assert len(started) == 2
    for record in started:
        words = record["argv"]
        assert words[words.index("--kv-cache-memory-bytes") + 1] == str(8155 << 20)
        assert words[words.index("--gpu-memory-utilization") + 1] == "0.2"
    assert "kv_consumer" in machine.ok("env").stdout


def test_chunked_prefill(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    flag = "--no-enable-chunked-prefill"
    assert flag in machine.ok("env").stdout
    assert flag not in machine.ok("env", MAX_NUM_BATCHED_TOKENS="4096").stdout
    assert flag not in machine.ok("env", CHUNKED_PREFILL="on").stdout
    assert flag in machine.ok("env", MAX_NUM_BATCHED_TOKENS="4096", CHUNKED_PREFILL="off").stdout
    assert "ends inside the last block" in machine.run("doctor", MAX_NUM_BATCHED_TOKENS="4096").stdout


def test_other_settings_reach_the_command(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    found = machine.ok(
        "env",
        EXTRA_DECODE_ARGS="--enable-prefix-caching --override '{\"a\": 1}'",
        SERVED_MODEL_NAME="x,y",
        GPU_MEMORY_UTILIZATION="0.5",
        PREFILL_GPU_MEMORY_UTILIZATION="0.6",
        KV_BUFFER_SIZE="1e10",
        ENFORCE_EAGER="prefill",
        DTYPE="bfloat16",
        EXTRA_SIM_ARGS="",
    ).stdout
    prefill, decode = (shlex.split(found.split(f"# {role}\n")[1].splitlines()[0]) for role in ("prefill", "decode"))
    assert decode[-3:] == ["--enable-prefix-caching", "--override", '{"a": 1}']
    assert decode[decode.index("--served-model-name") + 1 :][:2] == ["x", "y"]
    assert decode[decode.index("--gpu-memory-utilization") + 1] == "0.5"
    assert prefill[prefill.index("--gpu-memory-utilization") + 1] == "0.6"
    assert '"kv_buffer_size":"1e10"' in decode[decode.index("--kv-transfer-config") + 1]
    assert "--enforce-eager" in prefill and "--enforce-eager" not in decode
    assert "PIECEWISE" not in found
    graphs = machine.ok("env", ENFORCE_EAGER="0").stdout
    assert "--enforce-eager" not in graphs and graphs.count('{"cudagraph_mode":"PIECEWISE"}') == 1
    assert prefill[prefill.index("--dtype") + 1] == "bfloat16"


def test_a_model_folder_is_made_absolute(machine: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.21.0", **VERSIONS["0.21.0"])
    folder = machine.run_dir.parent / "my model"
    folder.mkdir(parents=True)
    found = machine.ok("env", MODEL="my model", SERVED_MODEL_NAME="m").stdout
    assert f"serve '{folder}' --host" in found
