"""What the page and the metrics say of the clocks of the GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from disagg_power import status_file
from disagg_power.status_file import Status
from disagg_proxy.telemetry.clock_status import REASONS, ClockStatus

SET = Status(7, "set", clocks_mhz={"prefill": 1500, "decode": None})


class Watched(ClockStatus):
    """A status file, and whether its process lives."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "power.status"
        self.alive = True
        super().__init__(str(self.file), lambda pid: self.alive)

    def write(self, status: Status) -> tuple[str, str] | None:
        status_file.write(self.file, status)
        return self.poll()

    def values(self) -> dict[str, float]:
        return {
            "/".join([sample.name.removeprefix("disagg_proxy_"), *sample.labels.values()]): sample.value
            for family in self.metrics()
            for sample in family.samples
        }


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_nothing_is_said_without_a_file(watched: Watched) -> None:
    assert ClockStatus("").poll() is None and watched.poll() is None and watched.values() == {}
    watched.file.write_text("{")
    assert watched.poll() is None


def test_clocks_that_are_set_are_one_event(watched: Watched) -> None:
    assert watched.write(SET) == ("clocks_set", "clocks are set: prefill at most 1500 MHz")
    assert watched.poll() is None
    values = watched.values()
    assert values["gpu_clock_cap_hertz/prefill"] == 1.5e9 and "gpu_clock_cap_hertz/decode" not in values
    assert [values[f"gpu_clocks_default/{reason}"] for reason in REASONS] == [0] * len(REASONS)


def test_the_clocks_of_a_governor_change_without_events(watched: Watched) -> None:
    governed = replace(SET, governor="slo")
    assert watched.write(governed) == ("clocks_set", "clocks follow the SLO")
    assert watched.write(replace(governed, clocks_mhz={"prefill": 990})) is None
    assert watched.values()["gpu_clock_cap_hertz/prefill"] == 0.99e9
    missed = replace(governed, state="default", why="the SLO was missed", kind="slo_missed")
    assert watched.write(missed) == ("clocks_default", "GPU clocks are the default ones: the SLO was missed")
    assert watched.values()["gpu_clocks_default/slo_missed"] == 1


def test_a_holder_that_was_killed_or_stopped(watched: Watched) -> None:
    watched.write(SET)
    watched.alive = False
    kind, text = watched.poll() or ("", "")
    assert kind == "clocks_default" and "gone" in text and watched.values()["gpu_clocks_default/gone"] == 1
    watched.file.unlink()
    kind, text = watched.poll() or ("", "")
    assert kind == "clocks_default" and watched.values()["gpu_clocks_default/stopped"] == 1
    assert watched.poll() is None
