"""Clocks of a running machine on simulated GPUs: set by `all`, reset by `stop` and after every kind of death."""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path

import pytest

from disagg_power.simulated import GpuModel, SimulatedGpus
from tests.script.machine import Machine, wait_for


@pytest.fixture
def gpus(machine: Machine, tmp_path: Path) -> SimulatedGpus:
    """Two simulated GPUs whose clocks this machine may set."""
    folder = tmp_path / "gpus"
    folder.mkdir()
    machine.env |= {
        "POWER_SIMULATED": str(folder / "gpus.json"),
        "POWER_SIMULATED_PRIVILEGED": "1",
        "PREFILL_SM_CLOCK": "1500",
        "DECODE_SM_CLOCK": "lock:1000",
    }
    return SimulatedGpus(folder / "gpus.json", [GpuModel(), GpuModel()])


def locks(gpus: SimulatedGpus) -> list[tuple[int, int] | None]:
    return [gpu.sm_lock() for gpu in gpus.all()]


SET, DEFAULT = [(345, 1500), (1005, 1005)], [None, None]


def test_all_sets_and_stop_resets(machine: Machine, gpus: SimulatedGpus) -> None:
    done = machine.ok("all")
    assert locks(gpus) == SET
    assert "prefill 1500 MHz, decode 1005 MHz" in done.stderr
    assert "SM clock 1000 MHz is not supported: 1005 MHz" in done.stderr
    assert "holds the clocks" in machine.ok("status").stdout
    doctor = machine.run("doctor").stdout
    assert "clocks may be set by nvml" in doctor and "GPU 0 1 are set by the guard" in doctor
    assert "GPU 0: SM clocks 345 to 1980 MHz" in doctor
    machine.ok("all")
    machine.ok("stop")
    assert locks(gpus) == DEFAULT and not (machine.run_dir / "power.state").exists()


def test_without_permission_everything_else_works(machine: Machine, gpus: SimulatedGpus) -> None:
    done = machine.ok("all", POWER_SIMULATED_PRIVILEGED="0")
    (line,) = [line for line in done.stderr.splitlines() if "Clocks and power limits are not set" in line]
    assert "no zeusd answers" in line
    assert machine.complete()["choices"] and machine.ok("status", POWER_SIMULATED_PRIVILEGED="0")
    assert "clocks may not be set" in machine.run("doctor", POWER_SIMULATED_PRIVILEGED="0").stdout
    assert gpus.changes == 0, "nothing was set or tried, by doctor either"


@pytest.mark.parametrize("part", ["supervisor", "power"])
def test_clocks_are_default_after_the_death_of(machine: Machine, gpus: SimulatedGpus, part: str) -> None:
    machine.ok("all")
    os.kill(machine.pid(part), signal.SIGKILL)
    wait_for(lambda: locks(gpus) == DEFAULT, 40)
    assert machine.complete()["choices"], "requests are served all the same"


@pytest.mark.parametrize("command", ["stop", "all"])
def test_after_everything_was_killed_doctor_says_so_and_the_next_command_resets(
    machine: Machine, gpus: SimulatedGpus, command: str
) -> None:
    machine.ok("all")
    # The watchers first: they would reset what the others leave.
    left = sorted(machine.leftovers().items(), key=lambda one: ("watcher" not in one[1], "guard" not in one[1]))
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not machine.leftovers())
    if locks(gpus) == SET:
        assert "were left by a guard that was killed" in machine.run("doctor").stdout
    machine.ok(command, PREFILL_SM_CLOCK="", DECODE_SM_CLOCK="")
    assert locks(gpus) == DEFAULT


@pytest.mark.timeout(400)
def test_a_sweep_over_clocks_beside_plain_engines(machine: Machine, gpus: SimulatedGpus, tmp_path: Path) -> None:
    """The mechanics only: which setups are measured, at one rate, and that clocks come back. Figures mean nothing."""
    machine.env |= {"BENCH_CLOCKS": "2", "BENCH_ROUNDS": "1", "BENCH_SECONDS": "1", "BENCH_RATES": "4"}
    machine.env |= {"BENCH_INPUT_LEN": "32", "BENCH_OUTPUT_LEN": "4", "REPORT_DIR": str(tmp_path / "reports")}
    machine.ok("all")
    done = machine.ok("bench", "--clocks", "--against-plain", "--traditional", timeout=350)
    (report,) = (tmp_path / "reports").iterdir()
    setups = {path.name: len(list(path.glob("run-*.json"))) for path in (report / "setups").iterdir()}
    assert setups.keys() == {"01-pd", "02-pd-equal", "03-plain", "04-single-equal"}
    assert setups["01-pd"] >= 5 and setups["02-pd-equal"] == 3 and setups["03-plain"] >= 3
    assert setups["04-single-equal"] == 3
    page = (report / "summary.md").read_text()
    assert "SIMULATED" in page and "4 requests/s" in page and "Pareto" not in done.stderr
    assert locks(gpus) == SET, "what ran before is back, with its clocks"


def test_a_sweep_without_permission_says_so_and_changes_nothing(machine: Machine, gpus: SimulatedGpus) -> None:
    machine.env |= {"POWER_SIMULATED_PRIVILEGED": "0"}
    machine.ok("all")
    done = machine.run("bench", "--clocks")
    assert done.returncode == 1 and "clocks cannot be set" in done.stderr
    assert gpus.changes == 0
    assert machine.run("bench", "--clocks", "--ratio").returncode == 2
    assert machine.run("bench", "--traditional").returncode == 2


def metrics(machine: Machine) -> str:
    try:
        with urllib.request.urlopen(machine.url + "/metrics", timeout=10) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def test_the_governor_killed_leaves_default_clocks_and_the_metrics_say_why(
    machine: Machine, gpus: SimulatedGpus
) -> None:
    """Without requests decode's clock goes down step by step; prefill's stays, because nothing is known of it yet."""
    done = machine.ok("all", POWER_GOVERNOR="slo")
    assert "POWER_GOVERNOR=slo" in done.stderr
    wait_for(lambda: 0 < (locks(gpus)[1] or (0, 0))[1] < 1980, 40)
    wait_for(lambda: 'gpu_clock_cap_hertz{role="decode"}' in metrics(machine), 40)
    os.kill(machine.pid("power"), signal.SIGKILL)
    wait_for(lambda: locks(gpus) == DEFAULT, 40)
    wait_for(lambda: 'gpu_clocks_default{reason="gone"} 1.0' in metrics(machine), 40)


def test_the_command_power_looks_and_resets(machine: Machine, gpus: SimulatedGpus) -> None:
    shown = machine.ok("power").stdout
    assert "clocks may be set by: nvml" in shown and "GPU 1 Simulated H200: 345 to 1980 MHz" in shown
    assert machine.ok("power", "reset").stdout == "nothing to reset\n"
    assert gpus.changes == 0
