"""The proxy and its pair are those of tests/simulated.py."""

from __future__ import annotations

import pytest

from disagg_proxy.cluster.instance import State
from disagg_sim import SimEngine
from tests.e2e.together import OWN
from tests.simulated import Machine, machine, pair

__all__ = ["machine", "pair", "two"]


@pytest.fixture
async def two(machine: Machine) -> tuple[SimEngine, list[SimEngine]]:
    """One prefill and two decodes with this project's connector."""
    prefill, first = await machine.pair(**OWN)
    second = await machine.engine("decode", **OWN)
    await machine.proxy.until_state(second.http_address, State.READY)
    return prefill, [first, second]
