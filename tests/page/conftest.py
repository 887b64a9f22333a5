"""The proxy and its pair are those of tests/simulated.py; browsers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.page.browser import Browser, chromium
from tests.simulated import machine, pair

__all__ = ["machine", "pair"]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """One that must have nothing to complain of."""
    async with chromium() as running:
        yield running
        assert running.unexpected() == []
