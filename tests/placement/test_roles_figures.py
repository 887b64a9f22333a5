"""What the decision about roles reads of the registry."""

from __future__ import annotations

from disagg_proxy.cluster.engine_load import EngineLoad
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.kv_kind import KvKind
from disagg_proxy.placement.roles import InstanceFigures
from disagg_proxy.placement.roles_figures import FiguresReader, TokenGaps, prefill_wait
from tests.cluster.conftest import World, world

__all__ = ["world"]

BOTH = KvKind("disagg_kv", both_roles=True)
OWN = KvKind("disagg_kv")
P, D = Role.PREFILL, Role.DECODE


def read(world: World) -> dict[int, InstanceFigures]:
    reader = FiguresReader(world.registry, lambda instance: prefill_wait(instance, world.time))
    ports = {instance.key: instance.http.port for instance in world.registry.instances()}
    return {ports[one.key]: one for one in reader.read(world.time)}


def leg(world: World, instance: Instance, tokens: int = 0, prefill: bool = False):
    pending = instance.progress.begin(lambda: world.time, tokens=tokens)
    pending.prefill = prefill
    return pending


def test_groups_share_a_model_and_exchange_kv(world: World) -> None:
    world.ready(D, 1, "a", kind=BOTH)
    world.ready(D, 2, "a", "b", kind=BOTH)
    world.ready(P, 3, "b", kind=OWN)
    world.ready(D, 4, "a", kind=KvKind("disagg_kv", (("kv_digest", "other"),), both_roles=True))
    world.ready(D, 5, "a", kind=KvKind("nixl"))
    world.ready(D, 6, "c", kind=BOTH)
    world.ready(P, 7, "d", kind=OWN)
    world.ready(D, 8, "d", kind=OWN)
    found = read(world)
    groups: dict[str, set[int]] = {}
    for port, one in found.items():
        groups.setdefault(one.group, set()).add(port)
    # An engine that announces no digest exchanges KV with one that does.
    assert {1, 2, 3} <= next(ports for ports in groups.values() if 1 in ports)
    assert {6} in groups.values() and not {5, 7, 8} & found.keys()
    assert found[3].roles == {P} and found[1].roles == set(Role)


def test_without_engines_of_both_roles_there_is_nothing_to_decide(world: World) -> None:
    world.ready(P, 1, kind=OWN)
    world.ready(D, 2, kind=OWN)
    assert read(world) == {}


def test_the_figures_of_an_instance(world: World) -> None:
    one, other = world.ready(D, 1, kind=BOTH), world.ready(D, 2, kind=BOTH)
    assert read(world)[1].read_at is None
    one.computing_tokens = 600
    one.engine_load = EngineLoad(99.0, running=3, waiting=1, kv_usage=0.25, kv_capacity_tokens=1000)
    one.kv_committed, one.in_flight = 400, 7
    for tokens in (100, 200, 300):
        leg(world, one, tokens, prefill=True)
        world.time += 1
    leg(world, one, 5000)
    found = read(world)[1]
    assert (found.read_at, found.running, found.kv_usage) == (99.0, 3, 0.25)
    assert (found.kv_promised, found.in_flight) == (0.4, 7)
    assert (found.prefill_tokens, found.prefill_wait) == (600, 2.0)
    assert found.usable and read(world)[2].usable
    world.registry.drain(one)
    world.registry.suspect(other, True)
    assert not read(world)[1].usable and not read(world)[2].usable


def test_a_long_prompt_alone_is_no_wait(world: World) -> None:
    one = world.ready(D, 1, kind=BOTH)
    first = leg(world, one, 60_000, prefill=True)
    world.time += 5
    assert prefill_wait(one, world.time) == 0
    leg(world, one, 10, prefill=True)
    world.time += 2
    assert prefill_wait(one, world.time) == 2
    first.on_data()
    assert prefill_wait(one, world.time) == 0


def test_gaps_are_those_of_streams(world: World) -> None:
    one, gaps = world.ready(D, 1, kind=BOTH), TokenGaps()
    assert gaps.read(one, 10.0) is None
    streams = [leg(world, one) for _ in range(4)]
    assert gaps.read(one, 11.0) is None, "none has begun"
    for stream in streams:
        stream.on_data()
    gaps.read(one, 12.0)
    one.progress.outputs += 200
    assert gaps.read(one, 13.0) == 4 * 1.0 / 200
    assert gaps.read(one, 14.0) is None, "no output"
    world.registry.process_ended(one)
    assert gaps.read(one, 15.0) is None, "another process"
