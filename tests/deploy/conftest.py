"""The command as a process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.command import Run, commands


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    async with commands() as start:
        yield start
