"""When the proxy reads the load of engines: for elastic placement, and for the page."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import soon
from tests.simulated import machine, pair

__all__ = ["machine", "pair"]


async def loaded(machine, engine) -> None:
    while machine.proxy.instance(engine.http_address).engine_load is None:
        await asyncio.sleep(0.01)


@pytest.mark.settings(placement="elastic")
async def test_elastic_placement_needs_it(machine, pair) -> None:
    for engine in pair:
        await soon(loaded(machine, engine))


async def test_the_page_needs_it_and_nothing_else(machine, pair) -> None:
    assert not machine.proxy.services._loads_needed()
    await machine.proxy.services.page_view()
    for engine in pair:
        await soon(loaded(machine, engine))
    shown = (await machine.proxy.services.page_view())["instances"]
    assert [instance["engine_load"]["running"] for instance in shown] == [0, 0]
