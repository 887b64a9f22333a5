"""A cluster file for the tests that need no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg_ray import settings
from disagg_ray.settings import Cluster


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.write_text("the shared secret\n")
    return {"name": "qwen", "model": "Qwen3-4B", "engine": "sim", "secret_file": str(secret), "run_dir": str(tmp_path)}


@pytest.fixture
def cluster(raw: dict[str, Any]) -> Cluster:
    return settings.parse(raw)
