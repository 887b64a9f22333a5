"""A machine for each test, cleaned up after it; nothing may be left running."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.script.machine import Machine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As for what a shell starts with `&`. The programs under test would inherit it, and bash cannot take it back.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """The script with folders (with blanks in their names) and ports of its own."""
    one = Machine(tmp_path / "a folder")
    yield one
    assert one.clean_up() == {}


@pytest.fixture
def second_machine(tmp_path: Path) -> Iterator[Machine]:
    """Another one on the same computer."""
    one = Machine(tmp_path / "another folder")
    yield one
    assert one.clean_up() == {}
