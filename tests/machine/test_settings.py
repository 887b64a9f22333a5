"""Where values come from, what depends on others, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from disagg_machine import messages, settings
from disagg_machine.messages import MachineError
from disagg_machine.settings import DEFAULT, ENVIRONMENT, FILE, RUNNING, Settings, load
from disagg_machine.table import SETTINGS
from disagg_machine.values import Number
from disagg_proxy.config import table as proxy_table

ROOT, HERE = Path("/checkout"), Path("/home/me/here")


@pytest.fixture(autouse=True)
def english() -> None:
    messages.use("en")


def read(**environ: str) -> Settings:
    return load(dict(environ), ROOT, HERE)


def test_the_table_and_the_fields_agree() -> None:
    fields = [field.name for field in dataclasses.fields(Settings)]
    assert fields == ["texts", "sources", *(setting.name for setting in SETTINGS)]


def test_settings_that_proxy_and_machine_share_have_the_same_default() -> None:
    """The machine's proxy listens for engines on this machine only."""
    here = {setting.env: setting.default for setting in SETTINGS}
    shared = {one.env: one.default for one in proxy_table.SETTINGS if one.env in here}
    assert {name for name in shared if shared[name] != here[name]} == {"PROXY_HOST"}
    assert {"HTTP_PROXY_PORT", "API_KEY", "DISAGG_KV_SECRET"} <= shared.keys()


def test_defaults() -> None:
    found = read(MODEL="m")
    assert (found.prefill_gpu, found.decode_gpu, found.tensor_parallel) == ("0", "1", 1)
    assert (found.max_model_len, found.max_num_batched_tokens) == (10000, 10000)
    assert found.prefill_gpu_memory_utilization == "0.9" and found.decode_gpu_memory_utilization is None
    assert found.start_timeout is None and found.bench_requests is None and found.supervise is True
    assert (found.run_dir, found.log_dir) == (Path("/checkout/run"), Path("/checkout/logs"))
    assert (found.venv_dir, found.python) == (Path("/checkout/.venv"), "python3")
    assert {name for name, source in found.sources.items() if source != DEFAULT} == {"MODEL"}


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,6"}, ("4", "6")),
        ({"CUDA_VISIBLE_DEVICES": "4,6,7", "TENSOR_PARALLEL": "2"}, ("4", "7")),
        ({"CUDA_VISIBLE_DEVICES": "5"}, ("5", "6")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a"}, ("GPU-a", "1")),
        ({"PREFILL_GPU": "3", "TENSOR_PARALLEL": "4"}, ("3", "7")),
        ({"PREFILL_GPU": "3", "DECODE_GPU": "1"}, ("3", "1")),
    ],
)
def test_gpus(environ: dict[str, str], gpus: tuple[str, str]) -> None:
    found = read(**environ)
    assert (found.prefill_gpu, found.decode_gpu) == gpus


def test_one_share_of_memory_for_both_roles() -> None:
    found = read(GPU_MEMORY_UTILIZATION="0.5", PREFILL_GPU_MEMORY_UTILIZATION="0.6")
    assert (found.prefill_gpu_memory_utilization, found.decode_gpu_memory_utilization) == ("0.6", "0.5")


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"MODEL": "org/model"}, ["model", "org/model"]),
        ({"MODEL": "/models/a/"}, ["a", "/models/a/"]),
        ({"MODEL": "model"}, ["model"]),
        ({"MODEL": "org/model", "SERVED_MODEL_NAME": "x,y"}, ["x", "y"]),
    ],
)
def test_names_under_which_the_model_is_served(environ: dict[str, str], names: list[str]) -> None:
    assert read(**environ).served_names == names


def test_paths_are_seen_from_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = read(RUN_DIR="there", REPORT_DIR="~/reports", PYTHON="bin/python")
    assert (found.run_dir, found.log_dir) == (HERE / "there", HERE / "there/logs")
    assert found.report_dir == Path("/home/me/reports") and found.python == str(HERE / "bin/python")


def test_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my settings"
    file.write_text(
        "# a comment\n\nexport MODEL='a/b c'\n DECODE_GPU=3 # the fast one\nPREFILL_GPU=\"2\"\nMAX_NUM_SEQS = 7\r\n"
        "DTYPE=half\nDTYPE=float\nHF_HOME=/cache\nHF_TOKEN=mine\nEXTRA_SIM_ARGS=\"--a '#b'\" # c\n"
    )
    environ = {"CONFIG": str(file), "PREFILL_GPU": "5", "HF_TOKEN": "theirs"}
    found = load(environ, ROOT, HERE)
    assert (found.model, found.decode_gpu, found.prefill_gpu, found.max_num_seqs) == ("a/b c", "3", "5", 7)
    assert found.dtype == "half" and found.extra_sim_args == "--a '#b'"
    assert (found.sources["MODEL"], found.sources["PREFILL_GPU"]) == (FILE, ENVIRONMENT)
    assert environ["HF_HOME"] == "/cache" and environ["HF_TOKEN"] == "theirs"
    assert "HF_HOME" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["just words", "1A=b", "=x"])
def test_a_line_that_is_not_understood(tmp_path: Path, line: str) -> None:
    file = tmp_path / "settings"
    file.write_text(f"MODEL=x\n{line}\n")
    with pytest.raises(MachineError) as refused:
        read(CONFIG=str(file))
    assert refused.value.code == 2 and "line 2" in str(refused.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(MachineError) as refused:
        read(CONFIG="nowhere")
    assert (refused.value.code, refused.value.arguments) == (2, (HERE / "nowhere",))


def test_the_file_of_the_proxy_is_seen_from_where_the_user_stands() -> None:
    assert read(CONFIG_FILE="proxy.toml").config_file == str(HERE / "proxy.toml")
    assert read().config_file == ""


def test_what_runs_is_remembered_without_secrets(tmp_path: Path) -> None:
    first = read(RUN_DIR=str(tmp_path), API_KEY="secret", MODEL="mine", HTTP_PROXY_PORT="7")
    settings.write_running(first)
    assert "secret" not in (tmp_path / "settings").read_text()
    later = {"RUN_DIR": str(tmp_path), "HTTP_PROXY_PORT": "8"}
    assert read(**later).sources["MODEL"] == DEFAULT, "nothing runs"
    start = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    (tmp_path / "proxy.pid").write_text(f"pid={os.getpid()}\nstart={start}\nboot={boot}")
    found = read(**later)
    assert (found.model, found.http_proxy_port) == ("mine", 8)
    assert (found.sources["MODEL"], found.sources["HTTP_PROXY_PORT"]) == (RUNNING, ENVIRONMENT)
    assert found.sources["VENV_DIR"] == DEFAULT

    # Only the secrets' names are known, so that no part is started beside the others without them.
    with pytest.raises(MachineError) as refused:
        settings.need_secrets(found)
    assert (refused.value.code, refused.value.key, refused.value.arguments) == (2, "secret_not_given", ("API_KEY",))
    settings.need_secrets(read(**later, API_KEY="secret"))
    settings.write_running(read(RUN_DIR=str(tmp_path)))
    settings.need_secrets(read(**later))


BAD = {
    "HTTP_PROXY_PORT": ["0", "65536", "08", "1 ", "x"],
    "MAX_MODEL_LEN": ["0", "-1", "many", "1000000000", "٣"],
    "KV_BUFFER_SIZE": ["8GB", "1.", "-1", "1e400"],
    "DECODE_GPU_MEMORY_UTILIZATION": ["0", "1.5", "0.0", ".", "2"],
    "SUPERVISE": ["yes", "2"],
    "ENGINE": ["gpu", "SIM"],
    "HTTP_PROXY_HOST": ["a b", "a/b"],
    "PREFILL_GPU": ["0,1", "0+"],
    "PREFILL_GPUS": ["0,,1", ",0"],
    "BENCH_RATES": ["1 zero", "1 0 2", "0.0"],
    "DTYPE": ["x;y"],
    "SERVED_MODEL_NAME": ["a b", "a,,b"],
    "MODEL": ["two\nlines"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_the_name(name: str, value: str) -> None:
    with pytest.raises(MachineError) as refused:
        read(**{name: value})
    assert refused.value.code == 2 and str(refused.value).startswith(f'{name}="') and "must be" in str(refused.value)


GOOD = {
    "KV_BUFFER_SIZE": ["8e9", "1.5E+10", "0"],
    "PREFILL_GPU_MEMORY_UTILIZATION": ["1", "1.0", ".5", "0.05"],
    "PREFILL_GPUS": ["0+1,2+3", "GPU-a,1"],
    "BENCH_RATES": ["1, 2.5", "10 20"],
    "HTTP_PROXY_HOST": ["::", "a.b-c"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_values_stay_as_they_were_written(name: str, value: str) -> None:
    found = getattr(read(**{name: value}), name.lower())
    assert found == value and (not isinstance(found, Number) or found.value == float(value))
