from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .pair import Pair, running


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """One prefill and one decode engine that take no time."""
    async with running() as engines:
        yield engines
