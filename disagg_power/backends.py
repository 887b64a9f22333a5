"""What sets clocks and power limits: NVML as root, zeusd's socket, ``sudo -n nvidia-smi``, or nothing.

Reading always goes through :mod:`disagg_power.devices`; only setting needs a permission, and only the guard does it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode

from disagg_power.devices import Device, NoPermission, NotSupported, PowerError
from disagg_power.gpus import PRIVILEGED

NAMES = ("auto", "nvml", "zeusd", "sudo", "none")
"""Values of POWER_BACKEND."""
ZEUSD_SOCKET = "/var/run/zeusd.sock"
SECONDS = 3.0
"""For one call of a program or a daemon."""


class Backend(Protocol):
    """Sets one GPU. Each method raises PowerError, :class:`NoPermission` where this user may not.

    Attributes:
        name: the value of POWER_BACKEND that stands for it.
    """

    @property
    def name(self) -> str: ...

    def sm_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        """Lock the SM clock within ``range`` in MHz, or reset it."""
        ...

    def memory_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        """Lock the memory clock within ``range`` in MHz, or reset it."""
        ...

    def power_limit(self, device: Device, watts: float) -> None:
        """Set the power limit."""
        ...


class NvmlBackend:
    """NVML, or the model of simulated GPUs: whatever the device itself does."""

    name = "nvml"

    def sm_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        device.reset_sm_clocks() if range is None else device.lock_sm_clocks(*range)

    def memory_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        device.reset_memory_clocks() if range is None else device.lock_memory_clocks(*range)

    def power_limit(self, device: Device, watts: float) -> None:
        device.set_power_limit(watts)


class SudoBackend:
    """``sudo -n nvidia-smi``, which a rule in sudoers must permit without a password."""

    name = "sudo"

    def sm_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        self._smi(device, "--reset-gpu-clocks" if range is None else f"--lock-gpu-clocks={range[0]},{range[1]}")

    def memory_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        self._smi(device, "--reset-memory-clocks" if range is None else f"--lock-memory-clocks={range[0]},{range[1]}")

    def power_limit(self, device: Device, watts: float) -> None:
        self._smi(device, f"--power-limit={watts:g}")

    def _smi(self, device: Device, option: str) -> None:
        words = ["sudo", "-n", "nvidia-smi", "-i", device.uuid, option]
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PowerError(f"GPU {device.index}: sudo nvidia-smi: {error}") from None
        output = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        if done.returncode:
            # nvidia-smi's code 4: no permission. sudo's is 1, with a text of its own.
            denied = done.returncode == 4 or output.startswith("sudo:") or "permission" in output.lower()
            kind = NoPermission if denied else NotSupported if done.returncode == 3 else PowerError
            raise kind(f"GPU {device.index}: {' '.join(words[:3])} {option}: {output[-200:] or done.returncode}")


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class ZeusdBackend:
    """The daemon of Zeus 0.16 and newer (zeusd 0.5), which takes the parameters of a change as a query."""

    name = "zeusd"

    def __init__(self, path: str) -> None:
        self._path = path

    def sm_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        self._clocks(device, "gpu", range)

    def memory_clocks(self, device: Device, range: tuple[int, int] | None) -> None:
        self._clocks(device, "mem", range)

    def power_limit(self, device: Device, watts: float) -> None:
        self._post(device, "set_power_limit", {"power_limit_mw": round(watts * 1000)})

    def _clocks(self, device: Device, which: str, range: tuple[int, int] | None) -> None:
        if range is None:
            self._post(device, f"reset_{which}_locked_clocks", {})
        else:
            self._post(device, f"set_{which}_locked_clocks", {"min_clock_mhz": range[0], "max_clock_mhz": range[1]})

    def _post(self, device: Device, what: str, parameters: Mapping[str, int]) -> None:
        query = urlencode({"gpu_ids": device.index, "block": "true", **parameters})
        status, body = self.call("POST", f"/gpu/{what}?{query}")
        if status != 200:
            kind = NoPermission if status in (401, 403) else PowerError
            raise kind(f"GPU {device.index}: zeusd refused {what}: {status} {body[:200]}")

    def call(self, method: str, path: str) -> tuple[int, str]:
        """One request: status and body.

        Raises:
            PowerError: nobody answers at the socket.
        """
        connection = _Unix(self._path)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise PowerError(f"zeusd at {self._path}: {error}") from None
        finally:
            connection.close()

    def controls(self) -> bool:
        """Whether the daemon offers to set GPUs; it decides by its own flags."""
        try:
            status, body = self.call("GET", "/discover")
            return status == 200 and "gpu-control" in json.loads(body)["enabled_api_groups"]
        except (PowerError, ValueError, KeyError, TypeError):
            return False


def zeusd_socket(environ: Mapping[str, str]) -> str:
    """Its path, in the variable that Zeus itself reads."""
    return environ.get("ZEUSD_SOCK_PATH") or ZEUSD_SOCKET


def candidates(devices: Sequence[Device], environ: Mapping[str, str]) -> list[Backend]:
    """The back ends that may set these GPUs, best first, found without setting or changing anything."""
    found: list[Backend] = []
    if devices and all(device.simulated for device in devices):
        # Nothing else reaches a simulated GPU.
        return [NvmlBackend()] if environ.get(PRIVILEGED) == "1" else []
    if os.geteuid() == 0:
        # In a container root may still be refused.
        found.append(NvmlBackend())
    path = zeusd_socket(environ)
    if Path(path).is_socket() and os.access(path, os.W_OK) and (zeusd := ZeusdBackend(path)).controls():
        found.append(zeusd)
    if os.geteuid() and sudo_permits():
        found.append(SudoBackend())
    return found


def sudo_permits() -> bool:
    """Whether sudo would run nvidia-smi without a password. ``-l`` looks at the rules and runs nothing."""
    smi = shutil.which("nvidia-smi")
    if smi is None or shutil.which("sudo") is None:
        return False
    words = ["sudo", "-n", "-l", smi, "--reset-gpu-clocks"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


NO_PERMISSION = (
    "clocks cannot be set: this user is not root, no zeusd answers, and sudo does not permit nvidia-smi without a "
    "password; everything else works"
)


def choose(name: str, devices: Sequence[Device], environ: Mapping[str, str]) -> Backend:
    """The back end that POWER_BACKEND names.

    Raises:
        NoPermission: there is none; the text is the line for the user.
    """
    if name == "none":
        raise NoPermission("clocks are not set: POWER_BACKEND=none")
    if name == "auto":
        found = candidates(devices, environ)
        if not found:
            raise NoPermission(NO_PERMISSION)
        return found[0]
    if name == "nvml":
        return NvmlBackend()
    if name == "sudo":
        return SudoBackend()
    path = zeusd_socket(environ)
    if not Path(path).is_socket():
        raise NoPermission(
            f"clocks cannot be set: POWER_BACKEND=zeusd, and there is no socket {path} (ZEUSD_SOCK_PATH)"
        )
    return ZeusdBackend(path)
