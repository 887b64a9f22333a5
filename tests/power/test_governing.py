"""The governor over simulated GPUs: figures of a proxy in, clocks out, default clocks whenever something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_power import hold, status_file
from disagg_power.devices import PowerError
from disagg_power.governing import RETRY, Governing, Objective, laws
from disagg_power.governor import FRESH, Governor
from disagg_power.guard_process import _do
from disagg_power.holder import Holder, RoleSetting
from disagg_power.lease import Lease, LeaseError
from disagg_power.proxy_figures import Totals, Windows, parse
from disagg_power.simulated import SimulatedGpus
from tests.power.fake import Clock, guard_over, two_gpus

SLO = Objective(1.0, 0.05)
ROLES = {"prefill": RoleSetting(("0",), sm="1005"), "decode": RoleSetting(("1",), sm="lock:795", power="650")}


class Proxy:
    """Its /metrics: each scrape shows requests and gaps of the same length more."""

    def __init__(self) -> None:
        self.ttft, self.gap, self.queued = 0.3, 0.01, 0
        self.count = 0
        self.down = False

    def scrape(self) -> str:
        if self.down:
            raise OSError("connection refused")
        self.count += 10
        lines = []
        for name, each in (("time_to_first_token", self.ttft), ("inter_token_latency", self.gap)):
            # The sum since the start: what came before has the same length, but for the newest ten.
            lines += [f"disagg_proxy_{name}_seconds_count {self.count}.0"]
            self.sums[name] = self.sums.get(name, 0.0) + 10 * each
            lines += [f"disagg_proxy_{name}_seconds_sum {self.sums[name]}"]
        lines.append(f"disagg_proxy_requests_queued {self.queued}.0")
        lines.append('disagg_proxy_instance_in_flight{address="a:1",role="prefill"} 1.0')
        return "\n".join(lines)

    @property
    def sums(self) -> dict[str, float]:
        found: dict[str, float] = self.__dict__.setdefault("_sums", {})
        return found


class DirectLease(Lease):
    """A lease of a guard in this process."""

    def __init__(self, gpus: SimulatedGpus, folder: Path, clock: Clock) -> None:
        self.guard = guard_over(gpus, folder, clock)
        self.gone = False

    def set(self, gpu: str, *, sm: str = "", memory: str = "", power: str = "") -> dict[str, object]:
        if self.gone:
            raise LeaseError("gone", "the guard is gone")
        try:
            return _do(self.guard, {"op": "set", "gpu": gpu, "sm": sm, "memory": memory, "power": power})
        except PowerError as error:
            raise LeaseError("device", str(error)) from None

    def default(self, gpu: str) -> None:
        try:
            self.guard.default(gpu)
        except PowerError as error:
            raise LeaseError("device", str(error)) from None

    def beat(self) -> None: ...


class World:
    """A proxy, two GPUs and a governor."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.gpus = two_gpus(folder / "machine", self.clock)
        self.proxy = Proxy()
        self.lines: list[str] = []
        self.lease = DirectLease(self.gpus, folder, self.clock)
        self.path = folder / "power.status"
        fixed = {"prefill": RoleSetting(("0",)), "decode": RoleSetting(("1",), power="650")}
        self.holder = Holder(fixed, lambda: self.lease, self.path, self.lines.append)
        assert self.holder.begin()
        governor = Governor(laws(ROLES, self.gpus, SLO))
        self.governing = Governing(self.holder, ROLES, governor, self.proxy.scrape, self.lines.append, self.clock)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / hold.BEAT)):
            self.clock.now += hold.BEAT
            self.governing.step()

    @property
    def caps(self) -> list[int | None]:
        return [lock[1] if (lock := gpu.sm_lock()) else None for gpu in self.gpus.all()]

    @property
    def status(self) -> status_file.Status:
        found = status_file.read(self.path)
        assert found is not None
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_clocks_go_down_to_the_floors_and_up_when_they_must(world: World) -> None:
    world.run(60)
    assert world.caps == [1005, 795] and world.status.clocks_mhz == {"prefill": 1005, "decode": 795}
    assert world.status.state == "set" and world.status.governor == "slo"
    world.proxy.gap = 0.049
    world.run(0.5)
    assert world.caps == [1005, 1980]
    world.proxy.gap, world.proxy.queued = 0.01, 4
    world.run(0.5)
    assert world.caps == [1980, 1980]


def test_without_figures_clocks_are_default_and_come_back(world: World) -> None:
    world.run(60)
    world.proxy.down = True
    world.run(FRESH)
    assert world.caps == [1005, 795]
    world.run(1)
    assert world.caps == [None, None] and world.status.kind == "no_data"
    assert world.status.state == "default" and "no figures" in world.status.why
    assert world.gpus.all()[1].power_limits().current_w == 650, "what does not depend on figures stays"
    world.proxy.down = False
    world.run(1)
    assert world.status.state == "set" and world.caps[1] == 795


def test_an_slo_that_is_missed_ends_governing(world: World) -> None:
    world.run(60)
    world.proxy.gap = 0.08
    world.run(2)
    assert world.caps == [None, None] and world.status.kind == "slo_missed"
    world.proxy.gap = 0.01
    world.run(1)
    assert world.status.state == "set"


def test_an_error_of_a_gpu_means_default_clocks_for_a_while(world: World) -> None:
    world.run(60)
    world.gpus.all()[1].set_lost()
    world.proxy.gap = 0.049
    world.run(0.5)
    assert world.gpus.all()[0].sm_lock() is None and world.status.kind == "device" and "lost" in world.status.why
    world.gpus.all()[1].set_lost(False)
    world.proxy.gap = 0.01
    world.run(RETRY - 1)
    assert world.status.kind == "device"
    world.run(2)
    assert world.status.state == "set"


def test_a_guard_that_is_gone_is_an_error(world: World) -> None:
    world.lease.gone = True
    with pytest.raises(LeaseError, match="gone"):
        world.run(60)


def test_the_floor_is_the_setting_or_half_of_the_highest_clock(world: World) -> None:
    found = laws({"prefill": RoleSetting(("0",)), "decode": RoleSetting(())}, world.gpus, SLO)
    assert list(found) == ["prefill"] and found["prefill"]._clocks[0] == 990


# -- figures


def test_a_window_is_what_came_since_the_last_scrape() -> None:
    windows = Windows()
    first = "disagg_proxy_time_to_first_token_seconds_sum 90.0\ndisagg_proxy_time_to_first_token_seconds_count 9.0"
    assert windows.take(first, 1.0).ttft_s is None, "what came before the first scrape is unknown"
    second = first.replace("90.0", "91.0").replace("9.0\n", "9.0\n").replace("count 9.0", "count 11.0")
    assert windows.take(second, 2.0).ttft_s == 0.5
    assert windows.take(second, 3.0).ttft_s is None, "nothing new"
    assert windows.take(first, 4.0).ttft_s is None, "the proxy was restarted"


def test_a_tail_above_the_mean_counts_but_is_never_overestimated() -> None:
    before = Totals(0.0, 0.0, {0.1: 0, 1.0: 0, 2.5: 0})
    assert Totals(10.0, 100.0, {0.1: 90, 1.0: 92, 2.5: 100}).since(before) == 1.0
    assert Totals(10.0, 100.0, {0.1: 97, 1.0: 100, 2.5: 100}).since(before) == 0.1
    assert Totals(500.0, 100.0, {0.1: 0, 1.0: 0, 2.5: 0}).since(before) == 5.0


def test_metrics_are_read_as_prometheus_writes_them() -> None:
    text = """# HELP x
disagg_proxy_inter_token_latency_seconds_bucket{le="0.05"} 3.0
disagg_proxy_inter_token_latency_seconds_bucket{le="+Inf"} 4.0
disagg_proxy_inter_token_latency_seconds_sum 1.5
disagg_proxy_inter_token_latency_seconds_count 4.0
disagg_proxy_requests_queued 2.0
disagg_proxy_instance_in_flight{address="[::1]:1",role="prefill"} 3.0
disagg_proxy_instance_in_flight{address="b:2",role="decode"} 9.0
disagg_proxy_instance_in_flight{address="c:1",role="prefill"} 1.0
"""
    ttft, gap, queued, prompts = parse(text)
    assert ttft == Totals() and gap == Totals(1.5, 4.0, {0.05: 3.0}) and (queued, prompts) == (2, 4)
