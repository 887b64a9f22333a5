"""The GPUs of this machine: which this user may use, their memory, and how two of them are connected.

Everything comes from ``nvidia-smi``, which the driver brings: it works without any package, as `status` must.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

QUERY = ("--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")
LINKS = ("topo", "-m")
PEER_READS = ("topo", "-p2p", "r")

Smi = Callable[[Sequence[str]], str]
"""Runs ``nvidia-smi`` with these arguments: its stdout, empty when there is no driver or it fails."""

_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as ``nvidia-smi`` numbers it; memory in MiB, 0 where it does not say."""

    index: int
    uuid: str
    name: str
    total_mib: int
    free_mib: int

    def is_named(self, word: str) -> bool:
        """Whether ``word`` names it: its index, or the beginning of its UUID."""
        return word == str(self.index) or (word.startswith("GPU-") and self.uuid.startswith(word))


def run_nvidia_smi(arguments: Sequence[str]) -> str:
    """The :data:`Smi` of this machine."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return done.stdout.decode("utf-8", "replace")


def read_gpus(environ: Mapping[str, str], smi: Smi = run_nvidia_smi) -> list[Gpu]:
    """The GPUs that this user may use (CUDA_VISIBLE_DEVICES); none where there is no driver."""
    return [gpu for gpu in parse_gpus(smi(QUERY)) if is_visible(gpu, environ.get("CUDA_VISIBLE_DEVICES"))]


def parse_gpus(csv: str) -> list[Gpu]:
    """The answer to :data:`QUERY`; lines of another form, such as errors of the driver, are left out."""
    found: list[Gpu] = []
    for line in csv.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 5 and fields[0].isdecimal():
            name = ", ".join(fields[2:-2])
            found.append(Gpu(int(fields[0]), fields[1], name, _mib(fields[-2]), _mib(fields[-1])))
    return found


def _mib(field: str) -> int:
    """``81559``; ``[N/A]`` is 0."""
    return int("0" + re.sub(r"[^0-9]", "", field))


def is_visible(gpu: Gpu, visible: str | None) -> bool:
    """``visible``: the value of CUDA_VISIBLE_DEVICES, None when it is not set; an empty one hides every GPU."""
    return visible is None or any(gpu.is_named(entry) for entry in visible.replace(",", " ").split())


def find(gpus: Sequence[Gpu], word: str) -> Gpu | None:
    """The GPU that ``word`` names; None when there is none."""
    return next((gpu for gpu in gpus if gpu.is_named(word)), None)


def indexes(gpus: Sequence[Gpu]) -> str:
    """Their indexes, as messages list them."""
    return " ".join(str(gpu.index) for gpu in gpus)


def matrix_entry(matrix: str, row: int, column: int) -> str:
    """How two GPUs are connected, by a matrix of ``nvidia-smi topo``; empty when it does not say.

    The header names the columns ``GPU0 GPU1 …``, every line begins with its row's name.
    """
    position: int | None = None
    for line in matrix.splitlines():
        words = _COLOR.sub("", line).split()
        if position is None:
            if f"GPU{column}" in words:
                position = words.index(f"GPU{column}")
        elif words and words[0] == f"GPU{row}":
            return words[position + 1] if position + 1 < len(words) else ""
    return ""
