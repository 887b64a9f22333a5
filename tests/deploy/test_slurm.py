"""The batch script: what shellcheck says, and that it calls what is there."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.command import ROOT

SCRIPT = ROOT / "deploy/slurm/disagg.sbatch"
LINES = SCRIPT.read_text().splitlines()


def test_shellcheck() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("NOT CHECKED: shellcheck is not installed")
    done = subprocess.run([program, "--shell=bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_is_short_and_says_how_to_use_it() -> None:
    assert LINES[0].startswith("#!") and LINES[1].startswith("#SBATCH ") and len(LINES) <= 16
    assert f"sbatch {SCRIPT.relative_to(ROOT)} cluster.yaml" in SCRIPT.read_text()
    assert SCRIPT.name in (ROOT / "docs/kubernetes.md").read_text()


def test_one_task_a_node_starts_ray_and_the_head_starts_the_cluster() -> None:
    text = SCRIPT.read_text()
    assert "--ntasks-per-node=1" in LINES[1] and '--min-nodes "$SLURM_NNODES"' in text
    # Options that `ray symmetric-run` refuses (ray/scripts/symmetric_run.py, 2.60).
    ray, _, entry = text[text.index("ray symmetric-run") :].partition(" -- ")
    assert not re.search(r"--(head|node-ip-address|port|block)\b", ray)
    assert 'disagg-proxy cluster up "$1" && sleep infinity' in entry
