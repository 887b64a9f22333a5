"""Description of the machine: processor, GPUs, versions. Without host names or other identities."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _output(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def gpus() -> list[str]:
    """One line per GPU: index, name, memory, driver version."""
    lines = _output("nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader")
    return [", ".join(field.strip() for field in line.split(",")) for line in lines.splitlines() if line.strip()]


def facts() -> dict[str, str]:
    """Facts of this machine, by name."""
    found = {
        "CPU": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores may be used",
        "System": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }
    for at, line in enumerate(gpus()):
        found[f"GPU {at}"] = line
    if commit := _output("git", "describe", "--always", "--dirty"):
        found["This project"] = commit
    return found
