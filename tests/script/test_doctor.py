"""`doctor`: what it finds with stub GPUs and made-up model folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.script.machine import Machine
from tests.script.stubs import Stubs


@pytest.fixture
def stubs(tmp_path: Path, machine: Machine) -> Stubs:
    made = Stubs(tmp_path / "stubs")
    made.vllm("0.21.0", randomises=True, switch=True)
    made.nvidia_smi(2)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    machine.env |= {"PATH": made.path, "ENGINE": "vllm", "MODEL": str(model)}
    return made


def test_a_good_machine(machine: Machine, stubs: Stubs) -> None:
    done = machine.ok("doctor")
    assert "[error]" not in done.stdout
    for words in ("vLLM 0.21.0", "RANDOMIZATION=1", "GPU 1: NVIDIA Stub 1", "NVLink (NV18)", "peer access"):
        assert words in done.stdout
    assert "KV buffer of decode on GPU 1: 24468 MiB beside vLLM's share, 8653 MiB wanted" in done.stdout


def test_without_gpus_there_are_no_errors(machine: Machine) -> None:
    done = machine.ok("doctor", ENGINE="auto", PATH="/usr/bin:/bin")
    assert "engines will be simulated" in done.stdout


def test_no_nvlink(machine: Machine, stubs: Stubs) -> None:
    stubs.nvidia_smi(2, link="SYS")
    done = machine.ok("doctor")
    assert "[warning] prefill to decode: no NVLink, the way is SYS" in done.stdout


def test_a_gpu_in_use(machine: Machine, stubs: Stubs) -> None:
    stubs.nvidia_smi(2, free=20000)
    done = machine.run("doctor")
    assert done.returncode == 1
    assert "[error] GPU 0: 20000 MiB free, 73403 MiB wanted for prefill" in done.stdout


def test_kv_buffer_that_does_not_fit(machine: Machine, stubs: Stubs) -> None:
    stubs.nvidia_smi(2, total=24576, free=24000)
    done = machine.run("doctor")
    assert done.returncode == 1 and "lower KV_BUFFER_SIZE" in done.stdout
    machine.ok("doctor", KV_BUFFER_SIZE="4e9")


def test_pinned_pool_that_does_not_fit(machine: Machine, stubs: Stubs) -> None:
    done = machine.run("doctor", MEM_POOL_SIZE_GB="100000")
    assert done.returncode == 1 and "lower MEM_POOL_SIZE_GB" in done.stdout


@pytest.mark.parametrize("lack", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_that_lacks_something(machine: Machine, stubs: Stubs, lack: str) -> None:
    Path(machine.env["MODEL"], lack).unlink()
    done = machine.run("doctor")
    assert done.returncode == 1 and "MODEL=" in done.stdout


def test_a_model_that_must_be_downloaded(machine: Machine, stubs: Stubs, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    offline = machine.run("doctor", MODEL="org/name", HF_HOME=cache, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE" in offline.stdout
    assert "org/name" in machine.run("doctor", MODEL="org/name", HF_HOME=cache).stdout
    snapshot = tmp_path / "cache/hub/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert "org/name is in" in machine.ok("doctor", MODEL="org/name", HF_HOME=cache, HF_HUB_OFFLINE="1").stdout


def test_randomisation_left_on_by_the_user(machine: Machine, stubs: Stubs) -> None:
    done = machine.ok("doctor", VLLM_DISABLE_REQUEST_ID_RANDOMIZATION="0")
    assert "[warning] your environment sets VLLM_DISABLE_REQUEST_ID_RANDOMIZATION" in done.stdout


def test_doctor_changes_nothing(machine: Machine, stubs: Stubs) -> None:
    machine.ok("doctor")
    assert not machine.run_dir.exists() and not machine.log_dir.exists()
    assert stubs.started() == []


def test_in_chinese(machine: Machine, stubs: Stubs) -> None:
    assert "[正常]" in machine.ok("doctor", LC_ALL="zh_CN.UTF-8").stdout
