"""Who gets in, and on which pair."""

import asyncio

import pytest

from disagg_proxy.admission.gate import Gate
from disagg_proxy.admission.limits import Limits
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.pairing import Pair, Pairing, Wish
from disagg_proxy.cluster.policy import round_robin
from disagg_proxy.errors import NoPair
from disagg_proxy.stats import Stats
from tests.cluster.conftest import World
from tests.conftest import soon


class Place:
    """Stands for the legs of one request: a place on each instance until it is given back."""

    def __init__(self, pair: Pair, world: World) -> None:
        self.pair = pair
        self._world = world
        for instance in (pair.prefill, pair.decode):
            instance.in_flight += 1

    def give_back(self) -> None:
        for instance in (self.pair.prefill, self.pair.decode):
            instance.in_flight -= 1
        self._world.registry.freed()


class Door:
    """A gate on instances of the test's making."""

    def __init__(self, **limits: int) -> None:
        self.world = World()
        registry = self.world.registry
        pairing = Pairing(registry, round_robin, round_robin)
        self.gate = Gate(pairing, registry, Limits(queue=100, **limits), Stats(lambda: self.world.time))

    def ask(self) -> "asyncio.Task[Place]":
        return asyncio.create_task(self.gate.admit("m", Wish.PAIR, 0, lambda pair: Place(pair, self.world)))


@pytest.mark.parametrize("limits", [{"in_flight": 1}, {"decode": 1}], ids=["in all", "of each decode"])
async def test_those_that_waited_take_the_instances_in_turn(limits: dict[str, int]) -> None:
    door = Door(**limits)
    prefills = [door.world.ready(Role.PREFILL, port) for port in (1, 2)]
    door.world.ready(Role.DECODE, 3)
    asked = [door.ask() for _ in range(6)]
    served = []
    for one in asked:
        place = await soon(one)
        served.append(place.pair.prefill)
        place.give_back()
    assert served == prefills * 3


async def waiting(door: Door, count: int) -> None:
    while door.gate.waiting != count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("role", list(Role))
async def test_those_that_wait_when_the_last_instance_is_drained_go_on_after_the_undrain(role: Role) -> None:
    door = Door(decode=1)
    instances = {Role.PREFILL: door.world.ready(Role.PREFILL, 1), Role.DECODE: door.world.ready(Role.DECODE, 2)}
    first = await soon(door.ask())
    queued = [door.ask(), door.ask()]
    await soon(waiting(door, 2))
    door.world.registry.drain(instances[role])
    first.give_back()
    with pytest.raises(NoPair, match="drained for maintenance"):
        await soon(door.ask())
    assert door.gate.waiting == 2 and not any(one.done() for one in queued)
    door.world.registry.drain(instances[role], draining=False)
    for one in queued:
        (await soon(one)).give_back()


async def test_a_drained_instance_may_restart_meanwhile() -> None:
    door = Door(decode=1)
    registry = door.world.registry
    prefill, decode = door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    registry.exchange.sends_towards(prefill, decode)
    first = await soon(door.ask())
    queued = door.ask()
    await soon(waiting(door, 1))
    for instance in (prefill, decode):
        registry.drain(instance)
    first.give_back()
    for instance in (decode, prefill):
        registry.suspend(instance, "refused", gone=True)
        await asyncio.sleep(0)
        assert door.gate.waiting == 1
    for instance in (decode, prefill):
        registry.admit(instance, {"m": {}})
    for instance in (decode, prefill):
        registry.drain(instance, draining=False)
    assert (await soon(queued)).pair == Pair(prefill, decode)


async def test_those_that_wait_are_told_when_an_undrained_side_goes() -> None:
    door = Door(decode=1)
    prefill, decode = door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    await soon(door.ask())
    queued = door.ask()
    await soon(waiting(door, 1))
    door.world.registry.drain(decode)
    door.world.registry.suspend(prefill, "refused", gone=True)
    with pytest.raises(NoPair, match=r"no prefill instance is ready.*; no decode instance is ready \(one is drained"):
        await soon(queued)
