"""A context of one command, with folders of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_machine import messages
from disagg_machine.context import Context
from disagg_machine.settings import load

MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """Makes a context with these settings, beside the environment of the tests. Texts are English."""
    messages.use("en")

    def build(**environ: str) -> Context:
        folders = {"RUN_DIR": str(tmp_path / "run"), "REPORT_DIR": str(tmp_path / "reports"), "MODEL": "org/model"}
        settings = {**folders, **environ}
        return Context(load(settings, tmp_path, tmp_path), tmp_path, {**os.environ, **settings}, "script")

    return build
