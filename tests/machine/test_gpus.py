"""Which GPUs there are for this user, and how two of them are connected, by made-up answers of nvidia-smi."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from disagg_machine.gpus import QUERY, Gpu, find, indexes, matrix_entry, parse_gpus, read_gpus, run_nvidia_smi

ANSWER = """\
0, GPU-aaaa-1111, NVIDIA H200, 143771, 143157
1, GPU-bbbb-2222, NVIDIA A100-SXM4-40GB, MIG, 40960, [N/A]
2, GPU-bbcc-3333, NVIDIA H200, 143771, 12
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU10\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-15\t0
GPU1\tNV18\t X \tPIX\t0-15\t0
GPU10\tSYS\tPIX\t X \t0-15\t0

Legend:
  SYS  = Connection traversing PCIe
"""


def smi(arguments: Sequence[str]) -> str:
    return ANSWER if tuple(arguments) == QUERY else ""


def test_gpus_are_read_from_the_query() -> None:
    assert parse_gpus(ANSWER) == [
        Gpu(0, "GPU-aaaa-1111", "NVIDIA H200", 143771, 143157),
        Gpu(1, "GPU-bbbb-2222", "NVIDIA A100-SXM4-40GB, MIG", 40960, 0),
        Gpu(2, "GPU-bbcc-3333", "NVIDIA H200", 143771, 12),
    ]
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver, x, y, z, 1\n") == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "0 1 2"),
        ("", ""),
        ("2,0", "0 2"),
        ("1, GPU-aaaa", "0 1"),
        ("GPU-bb", "1 2"),
        ("aaaa", ""),
        ("-1", ""),
    ],
)
def test_cuda_visible_devices_says_which_ones_are_for_this_user(visible: str | None, expected: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert indexes(read_gpus(environ, smi)) == expected


def test_a_gpu_is_named_by_index_or_uuid() -> None:
    gpus = parse_gpus(ANSWER)
    assert find(gpus, "1") is gpus[1] and find(gpus, "GPU-bbcc") is gpus[2]
    assert find(gpus, "3") is None and find(gpus, "GPU-x") is None and find([], "0") is None


def test_connections_by_the_matrix() -> None:
    assert matrix_entry(TOPOLOGY, 0, 1) == "NV18"
    assert matrix_entry(TOPOLOGY, 0, 10) == "SYS" and matrix_entry(TOPOLOGY, 10, 1) == "PIX"
    assert matrix_entry(TOPOLOGY, 0, 7) == matrix_entry(TOPOLOGY, 7, 0) == matrix_entry("", 0, 1) == ""


def test_nvidia_smi_that_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_nvidia_smi(QUERY) == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("not a program\n")
    program.chmod(0o755)
    assert run_nvidia_smi(QUERY) == ""
    program.write_text('#!/bin/sh\necho "0, GPU-a, $1, 2, 1"\nexit 9\n')
    assert read_gpus({})[0].uuid == "GPU-a"
