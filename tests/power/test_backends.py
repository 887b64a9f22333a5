"""The ways to set clocks, each against a stub of what it talks to."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagg_power import backends
from disagg_power.backends import NvmlBackend, SudoBackend, ZeusdBackend, candidates, choose, sudo_permits
from disagg_power.devices import NoPermission, NotSupported, PowerError
from disagg_power.simulated import GpuModel, SimulatedGpu, SimulatedGpus


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpus(models=[GpuModel(), GpuModel()]).all()[1]


class Programs:
    """`sudo` and `nvidia-smi` on PATH; what sudo was called with stands in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        for name in ("nvidia-smi", "sudo"):
            self.write(name, f"printf '%s\\n' \"$*\" >> {self.calls}")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    @property
    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Programs(tmp_path)


def test_sudo_runs_nvidia_smi_for_one_gpu(programs: Programs, gpu: SimulatedGpu) -> None:
    sudo = SudoBackend()
    sudo.sm_clocks(gpu, (345, 1410))
    sudo.sm_clocks(gpu, None)
    sudo.memory_clocks(gpu, (1593, 1593))
    sudo.memory_clocks(gpu, None)
    sudo.power_limit(gpu, 450)
    begin = f"-n nvidia-smi -i {gpu.uuid}"
    assert programs.called == [
        f"{begin} --lock-gpu-clocks=345,1410",
        f"{begin} --reset-gpu-clocks",
        f"{begin} --lock-memory-clocks=1593,1593",
        f"{begin} --reset-memory-clocks",
        f"{begin} --power-limit=450",
    ]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("echo 'sudo: a password is required' >&2; exit 1", NoPermission),
        ("echo 'Setting locked GPU clocks is not permitted: Insufficient Permissions'; exit 4", NoPermission),
        ("echo 'not supported for this device'; exit 3", NotSupported),
        ("exit 9", PowerError),
    ],
)
def test_what_sudo_refuses(programs: Programs, gpu: SimulatedGpu, script: str, kind: type[PowerError]) -> None:
    programs.write("sudo", script)
    with pytest.raises(kind, match="GPU 1") as failed:
        SudoBackend().sm_clocks(gpu, None)
    assert type(failed.value) is kind


def test_whether_sudo_permits_it_is_found_without_running_it(programs: Programs) -> None:
    assert sudo_permits()
    assert programs.called == [f"-n -l {programs.folder / 'nvidia-smi'} --reset-gpu-clocks"]
    programs.write("sudo", "exit 1")
    assert not sudo_permits()


class Zeusd:
    """A daemon at a socket."""

    def __init__(self, path: Path) -> None:
        self.requests: list[str] = []
        self.status = 200
        self.groups = ["gpu-control", "gpu-read"]
        daemon = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                daemon.requests.append(f"{self.command} {self.path}")
                body = json.dumps({"enabled_api_groups": daemon.groups}).encode() if self.command == "GET" else b"no"
                self.send_response(200 if self.command == "GET" else daemon.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815

            def address_string(self) -> str:
                return "unix"

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = socketserver.UnixStreamServer(str(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def zeusd(tmp_path: Path) -> Iterator[Zeusd]:
    daemon = Zeusd(tmp_path / "z")
    yield daemon
    daemon.close()


def test_zeusd_gets_its_parameters_as_a_query(zeusd: Zeusd, tmp_path: Path, gpu: SimulatedGpu) -> None:
    backend = ZeusdBackend(str(tmp_path / "z"))
    backend.sm_clocks(gpu, (345, 1410))
    backend.sm_clocks(gpu, None)
    backend.memory_clocks(gpu, (1593, 3201))
    backend.memory_clocks(gpu, None)
    backend.power_limit(gpu, 450.5)
    assert zeusd.requests == [
        "POST /gpu/set_gpu_locked_clocks?gpu_ids=1&block=true&min_clock_mhz=345&max_clock_mhz=1410",
        "POST /gpu/reset_gpu_locked_clocks?gpu_ids=1&block=true",
        "POST /gpu/set_mem_locked_clocks?gpu_ids=1&block=true&min_clock_mhz=1593&max_clock_mhz=3201",
        "POST /gpu/reset_mem_locked_clocks?gpu_ids=1&block=true",
        "POST /gpu/set_power_limit?gpu_ids=1&block=true&power_limit_mw=450500",
    ]
    zeusd.status = 403
    with pytest.raises(NoPermission, match="403"):
        backend.sm_clocks(gpu, None)
    zeusd.status = 500
    with pytest.raises(PowerError, match="500 no"):
        backend.sm_clocks(gpu, None)


def test_a_daemon_that_only_reads_does_not_count(zeusd: Zeusd, tmp_path: Path) -> None:
    backend = ZeusdBackend(str(tmp_path / "z"))
    assert backend.controls()
    zeusd.groups = ["gpu-read"]
    assert not backend.controls()
    assert all(request == "GET /discover" for request in zeusd.requests)
    assert not ZeusdBackend(str(tmp_path / "nobody")).controls()


class Real(SimulatedGpu):
    """One that does not say that it is simulated."""

    simulated = False


@pytest.fixture
def real() -> list[Real]:
    gpus = SimulatedGpus(models=[GpuModel()])
    return [Real(gpus, 0, gpus.all()[0].uuid, GpuModel())]


Euid = Callable[[int], None]


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Euid:
    return lambda number: monkeypatch.setattr(os, "geteuid", lambda: number)


def test_root_uses_nvml_and_a_user_what_permits_him(
    real: list[Real], user: Euid, zeusd: Zeusd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"ZEUSD_SOCK_PATH": str(tmp_path / "z")}
    monkeypatch.setattr(backends, "sudo_permits", lambda: True)
    user(0)
    assert [one.name for one in candidates(real, environ)] == ["nvml", "zeusd"]
    user(1000)
    assert [one.name for one in candidates(real, environ)] == ["zeusd", "sudo"]
    assert [one.name for one in candidates(real, {"ZEUSD_SOCK_PATH": "/nowhere"})] == ["sudo"]


def test_without_any_the_user_gets_one_line(real: list[Real], user: Euid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "sudo_permits", lambda: False)
    user(1000)
    with pytest.raises(NoPermission, match="everything else works"):
        choose("auto", real, {"ZEUSD_SOCK_PATH": "/nowhere"})
    with pytest.raises(NoPermission, match="/nowhere"):
        choose("zeusd", real, {"ZEUSD_SOCK_PATH": "/nowhere"})
    with pytest.raises(NoPermission, match="POWER_BACKEND=none"):
        choose("none", real, {})
    assert isinstance(choose("nvml", real, {}), NvmlBackend) and isinstance(choose("sudo", real, {}), SudoBackend)
