"""GPUs as nvidia-smi numbers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; memory in MiB."""

    index: int
    uuid: str
    name: str
    total_mib: int
    free_mib: int

    def is_named(self, word: str) -> bool:
        """Whether ``word`` names it: its index, or the beginning of its UUID."""
        return word == str(self.index) or (word.startswith("GPU-") and self.uuid.startswith(word))


def read_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that this user may use (CUDA_VISIBLE_DEVICES); none where there is no driver."""
    raise NotImplementedError


def find(gpus: list[Gpu], word: str) -> Gpu | None:
    """The GPU that ``word`` names; None when there is none."""
    return next((gpu for gpu in gpus if gpu.is_named(word)), None)
