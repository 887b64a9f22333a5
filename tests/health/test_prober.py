"""When an instance is probed, by probes that are answered when the test wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_proxy.cluster.instance import Instance, Role, State
from disagg_proxy.errors import EngineDeadline
from disagg_proxy.health.prober import Prober
from tests.cluster.conftest import World, world
from tests.conftest import soon

__all__ = ["world"]

MODELS = json.dumps({"data": [{"id": "m"}]}).encode()


class Engines:
    """Answers nothing while ``hang`` is set, otherwise as an engine that serves."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.hang = False

    async def request(self, method: str, instance: Instance, path: str, **more: Any) -> Any:
        self.asked.put_nowait(path)
        if self.hang:
            await asyncio.get_running_loop().create_future()
        whole = SimpleNamespace(status=200, body=MODELS)

        async def read() -> Any:
            return whole

        return SimpleNamespace(read_all=read)


@pytest.fixture
async def engines(world: World) -> AsyncIterator[Engines]:
    engines = Engines()
    prober = Prober(world.registry, engines, 60.0, b"")  # type: ignore[arg-type]
    prober.start()
    yield engines
    await prober.stop()


async def until_ready(instance: Instance) -> None:
    while instance.state is not State.READY:
        await asyncio.sleep(0)


@pytest.fixture
async def hung(world: World, engines: Engines) -> Instance:
    """An instance that has been ready, and whose probe in flight is not answered."""
    world.ping(Role.DECODE, 1)
    instance = world.instance(1)
    await soon(until_ready(instance))
    assert [await engines.asked.get() for _ in range(2)] == ["/health", "/v1/models"]
    world.time += 1
    engines.hang = True
    world.registry.recheck(instance)
    assert await soon(engines.asked.get()) == "/health"
    return instance


async def test_pings_that_are_back_do_not_wait_for_a_probe_that_hangs(world: World, engines: Engines, hung) -> None:
    world.time += 10
    world.registry.expire()
    assert hung.state is State.LOST
    engines.hang = False
    world.time += 1
    world.ping(Role.DECODE, 1)
    assert hung.state is State.PROBING
    await soon(until_ready(hung))


async def test_a_probe_in_flight_is_enough_while_nothing_has_changed(world: World, engines: Engines, hung) -> None:
    for _ in range(3):
        world.registry.recheck(hung)
        await asyncio.sleep(0)
    assert engines.asked.empty()


async def test_a_refresh_of_models_is_shared_and_bounded(
    world: World, engines: Engines, hung, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that names a model which does not exist waits for no engine that hangs."""
    monkeypatch.setattr("disagg_proxy.health.prober._REFRESH_SECONDS", 0.02)
    waiting = [asyncio.ensure_future(world.registry.refresh_models()) for _ in range(3)]
    assert await soon(engines.asked.get()) == "/health"
    # A client that leaves ends only its own wait.
    waiting[0].cancel()
    await soon(asyncio.gather(*waiting[1:]))
    assert hung.state is State.READY and hung.probe_failures == 0
    # Not again so soon.
    await soon(world.registry.refresh_models())
    assert engines.asked.empty()
    world.time += 1
    engines.hang = False
    await soon(world.registry.refresh_models())
    assert [await engines.asked.get() for _ in range(2)] == ["/health", "/v1/models"]


async def test_timeouts_take_an_instance_out_and_keep_the_reason_for_its_restart(
    world: World, engines: Engines, hung: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def times_out(*args: Any, **more: Any) -> Any:
        raise EngineDeadline("nothing came")

    monkeypatch.setattr(engines, "request", times_out)
    prober = Prober(world.registry, engines, 60.0, b"")  # type: ignore[arg-type]
    hung.probe_failures = 0
    seen = []
    for _ in range(3):
        await prober.probe(hung)
        seen.append(hung.state)
    assert seen == [State.READY, State.READY, State.PROBING]
    assert hung.reason == "its /health does not answer in time"
    world.registry.request_restart(hung, "its process hangs")
    await prober.probe(hung)
    assert (hung.state, hung.reason, hung.restart_wanted) == (State.PROBING, "its process hangs", True)
