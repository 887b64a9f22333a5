"""Which requests are admitted, in which order, and on which pair."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from disagg_proxy.admission.queue import PRIORITY_SECONDS, AdmissionQueue, Demand, Limits
from disagg_proxy.cluster.choice import NoCapacity, SingleEngine, Wish
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.lease import KvClaim, Placement
from disagg_proxy.cluster.policies import Traits, round_robin
from disagg_proxy.cluster.selection import Pair, PlacementPreference, Selection
from disagg_proxy.connectors.disagg_kv import KIND
from disagg_proxy.errors import NoPair, Overloaded, UnknownModel
from disagg_proxy.telemetry.stats import Stats
from tests.cluster.conftest import World
from tests.conftest import soon


class Door:
    """An admission queue over instances that the test registers."""

    def __init__(self, **limits: int) -> None:
        self.world = World()
        registry = self.world.registry
        self.selection = Selection(registry, round_robin, round_robin)
        self.admission_queue = AdmissionQueue(
            self.selection, registry, Limits(**{"queue": 100, **limits}), Stats(lambda: self.world.time)
        )

    def admit(self, model: str = "m") -> Placement | None:
        return self.admission_queue.try_acquire(Demand(model, PlacementPreference.PAIR))

    def ask(self) -> asyncio.Task[Placement]:
        return asyncio.create_task(self.admission_queue.acquire(Demand("m", PlacementPreference.PAIR)))


def pair_of(placement: Placement) -> Pair:
    assert placement.prefill is not None
    return Pair(placement.prefill, placement.decode)


async def test_with_capacity_nothing_is_awaited() -> None:
    door = Door(decode=1)
    pair = Pair(door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2))
    first = door.admit()
    assert first is not None and pair_of(first) == pair
    assert door.admit() is None and door.admission_queue.waiting == 0, "it waits once it asks to"
    queued = door.ask()
    await soon(waiting(door, 1))
    first.release()
    assert pair_of(await soon(queued)) == pair and door.admission_queue.waiting == 0


async def test_a_waiting_request_is_not_overtaken() -> None:
    door = Door(decode=1)
    door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    first = door.admit()
    queued = door.ask()
    await soon(waiting(door, 1))
    assert first is not None
    first.release()
    assert door.admit() is None, "there is room, but an earlier request waits for it"
    last = door.ask()
    (await soon(queued)).release()
    (await soon(last)).release()


async def test_what_no_wait_can_cure_is_raised_at_once() -> None:
    door = Door()
    with pytest.raises(NoPair):
        door.admit()
    door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    with pytest.raises(UnknownModel):
        door.admit("other")


async def test_a_full_queue_is_an_error_when_it_is_awaited() -> None:
    door = Door(decode=1, queue=0)
    door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    door.admit()
    assert door.admit() is None
    with pytest.raises(Overloaded, match="MAX_QUEUE"):
        await soon(door.ask())


async def test_who_leaves_the_queue_costs_nothing_even_when_its_turn_has_come() -> None:
    door = Door(decode=1)
    prefill, decode = door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    first = door.admit()
    assert first is not None
    queued = [door.ask(), door.ask()]
    await soon(waiting(door, 2))
    queued[1].cancel()
    await soon(waiting(door, 1))
    first.release()
    # The turn is given in the loop's next step, and nobody has been woken in this one.
    asyncio.get_running_loop().call_soon(queued[0].cancel)
    for one in queued:
        with pytest.raises(asyncio.CancelledError):
            await soon(one)
    assert (door.admission_queue.waiting, prefill.in_flight, decode.in_flight) == (0, 0, 0)


@pytest.mark.parametrize("limits", [{"in_flight": 1}, {"decode": 1}], ids=["in all", "of each decode"])
async def test_those_that_waited_take_the_instances_in_turn(limits: dict[str, int]) -> None:
    door = Door(**limits)
    prefills = [door.world.ready(Role.PREFILL, port) for port in (1, 2)]
    door.world.ready(Role.DECODE, 3)
    asked = [door.ask() for _ in range(6)]
    served = []
    for one in asked:
        place = await soon(one)
        served.append(place.prefill)
        place.release()
    assert served == prefills * 3


async def waiting(door: Door, count: int) -> None:
    while door.admission_queue.waiting != count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("role", list(Role))
async def test_those_that_wait_when_the_last_instance_is_drained_go_on_after_the_undrain(role: Role) -> None:
    door = Door(decode=1)
    instances = {Role.PREFILL: door.world.ready(Role.PREFILL, 1), Role.DECODE: door.world.ready(Role.DECODE, 2)}
    first = await soon(door.ask())
    queued = [door.ask(), door.ask()]
    await soon(waiting(door, 2))
    door.world.registry.drain(instances[role])
    first.release()
    with pytest.raises(NoPair, match="drained for maintenance"):
        await soon(door.ask())
    assert door.admission_queue.waiting == 2 and not any(one.done() for one in queued)
    door.world.registry.drain(instances[role], draining=False)
    for one in queued:
        (await soon(one)).release()


async def test_a_drained_instance_may_restart_meanwhile() -> None:
    door = Door(decode=1)
    registry = door.world.registry
    prefill, decode = door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    registry.kv_compatibility.record_send(prefill, decode)
    first = await soon(door.ask())
    queued = door.ask()
    await soon(waiting(door, 1))
    for instance in (prefill, decode):
        registry.drain(instance)
    first.release()
    for instance in (decode, prefill):
        registry.suspend(instance, "refused", gone=True)
        await asyncio.sleep(0)
        assert door.admission_queue.waiting == 1
    for instance in (decode, prefill):
        registry.admit(instance, {"m": {}})
    for instance in (decode, prefill):
        registry.drain(instance, draining=False)
    assert pair_of(await soon(queued)) == Pair(prefill, decode)


async def test_queued_requests_fail_when_an_undrained_role_goes() -> None:
    door = Door(decode=1)
    prefill, decode = door.world.ready(Role.PREFILL, 1), door.world.ready(Role.DECODE, 2)
    await soon(door.ask())
    queued = door.ask()
    await soon(waiting(door, 1))
    door.world.registry.drain(decode)
    door.world.registry.suspend(prefill, "refused", gone=True)
    with pytest.raises(NoPair, match=r"no prefill instance is ready.*; no decode instance is ready \(one is drained"):
        await soon(queued)


@pytest.mark.parametrize(
    ("configured", "longest", "fits"),
    [(0, 1000, True), (0, 999, False), (0, 0, False), (1000, 50, True), (999, 5000, False)],
)
def test_waiting_kv_is_limited_by_the_longest_prompt_unless_the_buffer_is_configured(
    configured: int, longest: int, fits: bool
) -> None:
    world = World()
    prefill, decode = world.ready(Role.PREFILL, 1), world.ready(Role.DECODE, 2)
    world.registry.admit(decode, {"m": {"max_model_len": longest or None}, "adapter": {"max_model_len": None}})
    limits = Limits(kv_tokens=configured)
    assert limits.has_capacity(decode, 10**9), "one is admitted where none waits"
    claim = KvClaim(world.registry, prefill, decode, 600)
    assert limits.has_capacity(decode, 400) is fits and not limits.has_capacity(decode, 401)
    assert limits.has_capacity(prefill, 10**9)
    claim.orphan()
    assert limits.has_capacity(decode, 10**9), "an orphan alone does not stop the decode"
    KvClaim(world.registry, prefill, decode, 1)
    assert limits.has_capacity(decode, 399) is fits and not limits.has_capacity(decode, 400)


class Others:
    """Other workers of the proxy, as the test wants them."""

    pause = 0.001

    def __init__(self) -> None:
        self.queued: list[tuple[int, float | None]] = []
        self.elsewhere = 0
        self.older = False
        self.lost = 0
        self.claims = self.settled = 0

    def refresh(self) -> None:
        return

    def claim(self, instances, kv_bytes, fits) -> bool:
        self.claims += 1
        if self.lost:
            self.lost -= 1
            return False
        return fits()

    def settle(self) -> None:
        self.settled += 1

    def queue(self, waiting: int, oldest: float | None) -> None:
        self.queued.append((waiting, oldest))

    def waiting(self) -> int:
        return self.elsewhere

    def has_older_waiter(self, since: float) -> bool:
        return self.older


def crowded(**limits: int) -> tuple[Door, Others]:
    door, others = Door(), Others()
    stats = Stats(asyncio.get_running_loop().time)
    selection = Selection(door.world.registry, round_robin, round_robin)
    door.admission_queue = AdmissionQueue(
        selection, door.world.registry, Limits(**{"queue": 100, **limits}), stats, others
    )
    door.world.ready(Role.PREFILL, 1)
    door.world.ready(Role.DECODE, 2)
    return door, others


async def test_a_withdrawn_claim_is_tried_again() -> None:
    door, others = crowded()
    others.lost = 3
    (await soon(door.ask())).release()
    assert others.claims == 4 and others.settled == 1
    assert others.queued[-1] == (0, None)


async def test_a_new_request_yields_to_those_in_other_workers_but_only_briefly() -> None:
    door, others = crowded()
    others.elsewhere, others.older = 1, True
    asked = door.ask()
    await soon(waiting(door, 1))
    assert others.claims == 0 and others.queued[-1][0] == 1
    (await soon(asked)).release()
    assert others.claims == 1


async def test_freed_capacity_goes_to_an_older_request_in_another_worker_first() -> None:
    door, others = crowded(decode=1)
    first = await soon(door.ask())
    queued = door.ask()
    await soon(waiting(door, 1))
    claims = others.claims
    others.older = True
    first.release()
    door.world.registry.freed()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert others.claims == claims, "however often something is given back"
    others.older = False
    door.world.registry.freed()
    (await soon(queued)).release()


async def test_the_queue_limit_counts_requests_in_other_workers() -> None:
    door, others = crowded(decode=1, queue=3)
    await soon(door.ask())
    others.elsewhere = 3
    with pytest.raises(Overloaded):
        await soon(door.ask())
    others.elsewhere = 2
    queued = door.ask()
    await soon(waiting(door, 1))
    with pytest.raises(Overloaded):
        await soon(door.ask())
    queued.cancel()


# -- priorities


class Line:
    """Requests of given priorities that wait for one slot, at times of a clock that the test sets."""

    def __init__(self) -> None:
        self.door = Door(decode=1)
        self.door.world.ready(Role.PREFILL, 1), self.door.world.ready(Role.DECODE, 2)
        self.served: list[str] = []
        first = self.door.admit()
        assert first is not None
        self._held = first

    async def arrive(self, name: str, priority: int, seconds: float = 0.0) -> None:
        self.door.world.time += seconds
        before = self.door.admission_queue.waiting
        self._task = asyncio.create_task(self._wait(name, priority))
        await soon(waiting(self.door, before + 1))

    async def _wait(self, name: str, priority: int) -> None:
        demand = Demand("m", PlacementPreference.PAIR, priority=priority)
        placement = await self.door.admission_queue.acquire(demand)
        self.served.append(name)
        placement.release()

    async def serve_all(self) -> list[str]:
        self._held.release()
        await soon(waiting(self.door, 0))
        await asyncio.sleep(0)
        return self.served


async def test_a_higher_priority_leaves_the_queue_earlier_and_equals_keep_their_order() -> None:
    line = Line()
    for name, priority in (("a0", 0), ("b5", 5), ("c0", 0), ("d9", 9), ("e5", 5), ("f9", 9)):
        await line.arrive(name, priority, 0.1)
    assert await line.serve_all() == ["d9", "f9", "b5", "e5", "a0", "c0"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 9), (3, 5)])
async def test_nobody_is_overtaken_by_those_that_arrive_later_than_the_bound(low: int, high: int) -> None:
    """However many of a higher priority keep coming: the bound is 5 s for each level between them."""
    bound = PRIORITY_SECONDS * (high - low)
    line = Line()
    await line.arrive("low", low)
    await line.arrive("just within", high, bound - 0.1)
    await line.arrive("at the bound", high, 0.1)
    for number in range(3):
        await line.arrive(f"later {number}", high, 0.1)
    assert await line.serve_all() == ["just within", "low", "at the bound", "later 0", "later 1", "later 2"]


async def test_a_request_that_was_admitted_before_is_overtaken_by_none() -> None:
    line = Line()
    await line.arrive("waits", 9)
    demand = Demand("m", PlacementPreference.PAIR, excluded={line.door.world.ready(Role.PREFILL, 3)})
    again = asyncio.create_task(line.door.admission_queue.acquire(demand))
    await soon(waiting(line.door, 2))
    await line.arrive("new", 9)
    line._held.release()
    (await soon(again)).release()
    assert await line.serve_all() == ["waits", "new"]


async def test_other_workers_get_the_rank_of_the_first_in_line() -> None:
    door, others = crowded(decode=1)
    first = await soon(door.ask())
    asked = []
    for count, priority in enumerate((0, 9, 4), 1):
        demand = Demand("m", PlacementPreference.PAIR, priority=priority)
        asked.append(asyncio.create_task(door.admission_queue.acquire(demand)))
        await soon(waiting(door, count))
    ranks = [rank for _, rank in others.queued if rank is not None]
    assert ranks[0] - ranks[-1] == pytest.approx(9 * PRIORITY_SECONDS, abs=1)
    first.release()
    for one in (asked[1], asked[2], asked[0]):
        (await soon(one)).release()


class _Undecided:
    """A placement whose prediction changes although nothing happens."""

    def __init__(self) -> None:
        self.asked = 0

    def decide(
        self, pair: Pair | None, engines: Sequence[Instance], uncached: Sequence[int], traits: Traits, wish: Wish
    ) -> Pair | SingleEngine:
        self.asked += 1
        if self.asked < 4 or pair is None:
            raise NoCapacity
        return pair


async def test_a_prediction_is_made_again_although_nothing_was_freed() -> None:
    door, undecided = Door(), _Undecided()
    for port, role in enumerate(Role, start=1):
        door.world.ready(role, port, kind=KIND)
    door.selection.set_chooser(undecided)
    placement = await soon(door.admission_queue.acquire(Demand("m", PlacementPreference.EITHER)))
    assert undecided.asked == 4 and placement.prefill is not None
