"""The units: understood by systemd, hardened, with times and commands that are those of the code."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from disagg_machine import table
from disagg_machine.cli import COMMANDS as MACHINE
from disagg_proxy.config.commands import SERVE
from disagg_proxy.config.table import SETTINGS
from tools.settings_tables import ROOT

FOLDER = ROOT / "deploy/systemd"
UNITS = ("disagg-proxy", "disagg-machine")
UNIT = pytest.mark.parametrize("name", UNITS)
PROXY = {setting.env: setting for setting in SETTINGS}


def unit(name: str) -> dict[str, list[str]]:
    """Each key with its values."""
    found = defaultdict(list)
    for line in (FOLDER / f"{name}.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    return found


@UNIT
def test_systemd_understands_it(name: str, tmp_path: Path) -> None:
    """With programs that exist in the place of those that it starts."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", (FOLDER / f"{name}.service").read_text(), flags=re.M)
    copy = tmp_path / f"{name}.service"
    copy.write_text(text)
    done = subprocess.run([analyze(), "verify", "--man=no", copy], capture_output=True, text=True)
    about_it = [line for line in done.stderr.splitlines() if copy.name in line]
    assert done.returncode == 0 and not about_it, done.stderr


@pytest.mark.parametrize(("name", "threshold"), [("disagg-proxy", 20), ("disagg-machine", 45)])
def test_it_is_hardened(name: str, threshold: int) -> None:
    """Exposure in tenths, of 100. The machine needs GPUs and compilers of kernels."""
    words = [analyze(), "security", "--offline=true", f"--threshold={threshold}", FOLDER / f"{name}.service"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:]


@UNIT
def test_it_is_started_again_but_not_for_a_bad_setting(name: str) -> None:
    one = unit(name)
    assert one["Type"] == ["exec"] and one["Restart"] == ["on-failure"] and one["RestartPreventExitStatus"] == ["2"]
    assert one["KillMode"] == ["mixed"], "SIGTERM to the main process only, which stops the others in order"
    assert int(one["RestartSec"][0]) * int(one["StartLimitBurst"][0]) < int(one["StartLimitIntervalSec"][0])


def test_a_shutdown_has_the_time_that_it_takes() -> None:
    assert int(unit("disagg-proxy")["TimeoutStopSec"][0]) >= float(PROXY["SHUTDOWN_GRACE"].default) + 5
    stop = int(table.BY_ENV["STOP_TIMEOUT"].default)
    assert int(unit("disagg-machine")["TimeoutStopSec"][0]) >= 30 + 2 * stop + 5


def test_a_reload_is_a_hangup() -> None:
    assert unit("disagg-proxy")["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_what_it_starts_are_commands() -> None:
    program, *words = unit("disagg-proxy")["ExecStart"][0].split()
    assert Path(program).name == "disagg-proxy" and words == [SERVE]
    script, command, *flags = unit("disagg-machine")["ExecStart"][0].split()
    assert (ROOT / Path(script).name).is_file()
    assert flags and all(flag in MACHINE[command].arguments for flag in flags)


def test_libzmq_gets_what_it_aborts_without() -> None:
    """Its threads set their scheduling, and it lists the interfaces when it binds; refused, it ends the process."""
    one = unit("disagg-proxy")
    assert one["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert "AF_NETLINK" in one["RestrictAddressFamilies"][0].split()


def test_metrics_of_the_process_stay() -> None:
    """prometheus_client reads /proc/stat."""
    assert "ProcSubset" not in unit("disagg-proxy")


@pytest.mark.parametrize(("name", "file"), [("disagg-proxy", "proxy.env"), ("disagg-machine", "machine.env")])
def test_settings_are_those_of_the_code(name: str, file: str) -> None:
    assert unit(name)["EnvironmentFile"] == [f"/etc/disagg-proxy/{file}"]
    lines = re.findall(r"^#?([A-Z_]+)=(.*)$", (FOLDER / file).read_text(), re.M)
    assert len(lines) >= 8
    for env, value in lines:
        setting = PROXY[env] if name == "disagg-proxy" else table.BY_ENV[env]
        if value and "/" not in value.removeprefix("http://"):
            setting.read(value)
    given = {word.partition("=")[0] for line in unit(name)["Environment"] for word in line.split()}
    assert given - {"HOME"} <= set(table.BY_ENV)


def test_folders_of_the_machine_are_those_that_systemd_makes() -> None:
    one = unit("disagg-machine")
    given = dict(word.split("=") for line in one["Environment"] for word in line.split())
    assert given["RUN_DIR"] == f"/run/{one['RuntimeDirectory'][0]}"
    assert given["LOG_DIR"] == f"/var/log/{one['LogsDirectory'][0]}"
    state = f"/var/lib/{one['StateDirectory'][0]}"
    assert all(given[name].startswith(state) for name in ("HOME", "REPORT_DIR", "VENV_DIR"))
    assert one["WorkingDirectory"] == [state] and state in (FOLDER / "disagg-proxy.sysusers").read_text()
    assert f"u {one['User'][0]} " in (FOLDER / "disagg-proxy.sysusers").read_text()
