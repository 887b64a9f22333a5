"""The table of settings, where values come from, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from disagg_machine import table
from disagg_machine.cli import COMMANDS
from disagg_machine.settings import LOCAL_MODELS, default_model
from tests.script.machine import REPOSITORY, SCRIPT, Machine


def shown(machine: Machine, **changes: str) -> dict[str, tuple[str, str]]:
    """`config` as name to (value, source)."""
    environment = machine.env
    machine.env = {**environment, **changes}
    lines = machine.ok("config").stdout.splitlines()
    machine.env = environment
    found = {}
    for line in lines:
        match = re.fullmatch(r"(\w+) +(.*?) +\((\w.*)\)", line)
        assert match, line
        found[match[1]] = (match[2], match[3])
    return found


DEFAULTS = {
    "PREFILL_GPU": "0",
    "DECODE_GPU": "1",
    "PREFILL_HTTP_PORT": "20003",
    "DECODE_HTTP_PORT": "20005",
    "HTTP_PROXY_PORT": "10001",
    "PROXY_PORT": "30001",
    "PREFILL_KV_PORT": "21001",
    "DECODE_KV_PORT": "22001",
    "ENGINE": "auto",
    "SUPERVISE": "1",
    "LOG_DIR": str(REPOSITORY / "logs"),
    "RUN_DIR": str(REPOSITORY / "run"),
}


def test_defaults(machine: Machine) -> None:
    names = [*DEFAULTS, "MODEL"]
    found = shown(machine, **dict.fromkeys(names, ""))
    assert {name: found[name] for name in DEFAULTS} == {name: (value, "default") for name, value in DEFAULTS.items()}
    there = [folder for folder in LOCAL_MODELS if os.path.exists(folder)]
    assert found["MODEL"] == ((there or ["Qwen/Qwen3-4B"])[0], "default")


def test_the_documented_default_model_has_a_local_copy_tried_first(machine: Machine, tmp_path: Path) -> None:
    assert "| `MODEL` | `Qwen/Qwen3-4B` |" in machine.ok("config", "--markdown", "en").stdout
    assert "MODEL=Qwen/Qwen3-4B" in machine.ok("help").stdout
    copy = tmp_path / "a copy"
    copy.mkdir()
    assert default_model([f"{tmp_path}/none", str(copy), str(tmp_path)]) == str(copy)
    assert default_model([f"{tmp_path}/none"]) == "Qwen/Qwen3-4B"


def test_environment_wins_over_file_and_file_over_default(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "my settings.env"
    file.write_text(
        "# a comment\n\nexport MODEL='a/b c'\nDECODE_GPU=3 # the fast one\nPREFILL_GPU=\"2\"\nMAX_NUM_SEQS = 7\r\n"
    )
    found = shown(machine, CONFIG=str(file), MODEL="", PREFILL_GPU="5")
    assert found["MODEL"] == ("a/b c", "CONFIG file")
    assert found["DECODE_GPU"] == ("3", "CONFIG file")
    assert found["PREFILL_GPU"] == ("5", "environment")
    assert found["MAX_NUM_SEQS"] == ("7", "CONFIG file")


def test_file_is_never_executed(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text(f"MODEL=$(touch {tmp_path}/ran)`touch {tmp_path}/ran`\n")
    found = shown(machine, CONFIG=str(file), MODEL="")
    assert found["MODEL"][0].startswith("$(touch")
    assert not (tmp_path / "ran").exists()


def test_foreign_names_in_the_file_reach_the_programs(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("HF_HUB_OFFLINE=1\n")
    assert "HF_HUB_OFFLINE" in machine.ok("config", CONFIG=str(file)).stderr


@pytest.mark.parametrize("text", ["just words\n", "1A=b\n"])
def test_bad_line_in_the_file(machine: Machine, tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings"
    file.write_text("MODEL=x\n" + text)
    done = machine.run("config", CONFIG=str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 2" in done.stderr


def test_missing_file(machine: Machine) -> None:
    done = machine.run("config", CONFIG="nowhere.env")
    assert done.returncode == 2 and "nowhere.env" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY_PORT", "0"),
        ("HTTP_PROXY_PORT", "65536"),
        ("PREFILL_KV_PORT", "08"),
        ("ENGINE", "gpu"),
        ("PREFILL_GPU_MEMORY_UTILIZATION", "1.5"),
        ("GPU_MEMORY_UTILIZATION", "0"),
        ("MAX_MODEL_LEN", "many"),
        ("KV_BUFFER_SIZE", "8GB"),
        ("SUPERVISE", "yes"),
        ("PREFILL_GPUS", "0,,1"),
        ("PREFILL_GPU", "0,1"),
        ("HTTP_PROXY_HOST", "a b"),
        ("SERVED_MODEL_NAME", "a b"),
        ("DTYPE", "x;y"),
        ("MODEL", "two\nlines"),
    ],
)
def test_bad_value_is_one_line_with_the_name(machine: Machine, name: str, value: str) -> None:
    machine.env[name] = value
    done = machine.run("config")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr


@pytest.mark.parametrize("name", ["EXTRA_SIM_ARGS", "EXTRA_PROXY_ARGS"])
def test_open_quote_in_arguments(machine: Machine, name: str) -> None:
    machine.env[name] = "--flag 'open"
    done = machine.run("env")
    assert done.returncode == 2
    assert "--flag 'open" in done.stderr


SECRETS = {setting.env: f"tell-nobody-{setting.env}" for setting in table.SETTINGS if setting.secret}


def test_secrets_are_not_shown(machine: Machine) -> None:
    assert len(SECRETS) >= 3
    for command in ("config", "env"):
        done = machine.ok(command, **SECRETS)
        assert "tell-nobody" not in done.stdout + done.stderr


def test_the_commands_of_env_do_not_start_without_the_keys(machine: Machine) -> None:
    """A copied line would otherwise start an open proxy."""
    assert ":?" not in machine.ok("env").stdout
    lines = [line for line in machine.ok("env", **SECRETS).stdout.splitlines() if "=" in line]
    named = {
        "proxy": {"API_KEY", "ENGINE_API_KEY", "DISAGG_KV_SECRET"},
        "prefill": {"VLLM_API_KEY", "DISAGG_KV_SECRET"},
        "decode": {"VLLM_API_KEY", "DISAGG_KV_SECRET"},
    }
    for line, names in zip(lines, named.values(), strict=True):
        assert set(re.findall(r'(\w+)="\$\{', line)) == names
        # The same variables before a program that shows them.
        probe = "".join(re.findall(r'\w+="\$\{[^"]*" ', line)) + "env"
        shell = ["bash", "-c", probe]
        done = subprocess.run(shell, env={"PATH": machine.env["PATH"]}, capture_output=True, text=True)
        assert done.returncode != 0 and done.stdout == "" and "set it first" in done.stderr
        known = {"PATH": machine.env["PATH"], **SECRETS}
        shown = subprocess.run(shell, env=known, capture_output=True, text=True, check=True).stdout
        for name in names:
            source = "ENGINE_API_KEY" if name == "VLLM_API_KEY" else name
            assert f"{name}={SECRETS[source]}\n" in shown


@pytest.mark.parametrize("language", ["en", "zh"])
def test_markdown_has_every_setting(machine: Machine, language: str) -> None:
    lines = machine.ok("config", "--markdown", language).stdout.splitlines()
    names = [re.fullmatch(r"\| `(\w+)` \| (`.+`)? ?\| (.+) \|", line) for line in lines[2:]]
    assert all(names)
    assert [match[1] for match in names if match] == list(shown(machine))


def test_markdown_does_not_depend_on_the_environment(machine: Machine) -> None:
    first = machine.ok("config", "--markdown", "en").stdout
    assert machine.ok("config", "--markdown", "en", MODEL="other", LC_ALL="zh_CN.UTF-8").stdout == first


def test_help_has_every_setting_and_command(machine: Machine) -> None:
    text = machine.ok("help").stdout
    for name in shown(machine):
        assert re.search(rf"^  {name}(=.*)?$", text, re.M), name
    assert re.findall(r"^  ([a-z]+) ", text.split("Settings,")[0], re.M) == list(COMMANDS)
    [folder] = re.findall(r"in (\S+); the first lines", text)
    assert (Path(folder) / "disagg-proxy.bash").is_file()


def test_chinese_when_the_locale_is(machine: Machine) -> None:
    assert "用法" in machine.ok("help", LC_ALL="zh_CN.UTF-8").stdout
    assert "用法" in machine.ok("help", LC_ALL="", LANG="zh_TW.UTF-8").stdout
    assert "用法" not in machine.ok("help", LC_ALL="en_US.UTF-8", LANG="zh_CN.UTF-8").stdout


def test_no_command_and_no_terminal(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 2 and "Usage" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("words", [["frobnicate"], ["all", "--fast"], ["logs", "-n", "x"], ["restart"], ["test", "x"]])
def test_wrong_usage(machine: Machine, words: list[str]) -> None:
    assert machine.run(*words).returncode == 2


def test_symlink_from_another_folder_and_sh(machine: Machine, tmp_path: Path) -> None:
    link = tmp_path / "a b" / "link to it"
    link.parent.mkdir()
    link.symlink_to(SCRIPT)
    for command in ([str(link)], ["sh", str(link)]):
        done = subprocess.run([*command, "help"], cwd="/", env=machine.env, capture_output=True, text=True, check=True)
        assert "RUN_DIR" in done.stdout


def test_cuda_visible_devices_names_the_gpus(machine: Machine) -> None:
    found = shown(machine, CUDA_VISIBLE_DEVICES="4,6")
    assert (found["PREFILL_GPU"][0], found["DECODE_GPU"][0]) == ("4", "6")


def test_paths_are_seen_from_the_user(machine: Machine) -> None:
    found = shown(machine, RUN_DIR="here", LOG_DIR="")
    assert found["RUN_DIR"][0] == str(machine.run_dir.parent / "here")
    assert found["LOG_DIR"][0] == str(machine.run_dir.parent / "here/logs")
