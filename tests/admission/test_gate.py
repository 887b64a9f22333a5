"""Who gets in, and on which pair."""

import asyncio

import pytest

from disagg_proxy.admission.gate import Gate
from disagg_proxy.admission.limits import Limits
from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.pairing import Pair, Pairing
from disagg_proxy.cluster.policy import round_robin
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
        return asyncio.create_task(self.gate.admit("m", 0, lambda pair: Place(pair, self.world)))


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
