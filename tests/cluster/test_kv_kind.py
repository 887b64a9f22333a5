"""Which instances can exchange KV, why others cannot, and the placement preferences."""

import pytest

from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.cluster.kv_kind import KvKind, why_apart
from disagg_proxy.cluster.policies import round_robin
from disagg_proxy.cluster.selection import NoCapacity, Pair, PlacementPreference, Selection, SingleEngine
from disagg_proxy.cluster.unavailable import why_no_pair
from disagg_proxy.connectors.p2p_nccl import KIND as P2P
from disagg_proxy.errors import NoPair, UnknownModel

P, D = Role.PREFILL, Role.DECODE
TRAITS = (("protocol_version", 1), ("tp", 1), ("dtype", "bfloat16"))
OWN = KvKind("disagg_kv", TRAITS, frozenset({"nccl", "tcp"}))


def own(*transports: str, **traits: object) -> KvKind:
    return KvKind("disagg_kv", tuple({**dict(TRAITS), **traits}.items()), frozenset(transports or OWN.transports))


@pytest.fixture
def selection(world):
    return Selection(world.registry, round_robin, round_robin)


@pytest.mark.parametrize(
    ("prefill", "decode", "why"),
    [
        (P2P, P2P, None),
        (OWN, own(), None),
        (OWN, own("tcp"), None),
        (P2P, OWN, "prefill speaks p2p_nccl, decode disagg_kv"),
        (OWN, P2P, "prefill speaks disagg_kv, decode p2p_nccl"),
        (own("nccl"), own("tcp"), "no common transport"),
        (OWN, own(tp=2), "tp is 1, on decode 2"),
        (OWN, own(tp=2, dtype="fp8"), "tp is 1, on decode 2; dtype is bfloat16, on decode fp8"),
        (own(kv_model="m", kv_digest="a"), own(kv_model="n", kv_digest="a"), None),
        (own(kv_model="m", kv_digest="a"), own(kv_model="m"), None),
        (own(kv_model="m"), own(kv_model="m", kv_digest="a"), None),
        (own(kv_model="m", kv_digest="a"), own(kv_model="n"), "kv_model is m, on decode n"),
        (own(kv_secret="0a1b2c3d"), own(kv_secret="0a1b2c3d"), None),
        (own(kv_secret="none"), own(), None),
        (own(), own(kv_secret="0a1b2c3d"), None),
        (own(kv_secret="0a1b2c3d"), own(kv_secret="none"), "only prefill has a shared secret (DISAGG_KV_SECRET)"),
        (own(kv_secret="none"), own(kv_secret="0a1b2c3d"), "only decode has a shared secret (DISAGG_KV_SECRET)"),
        (
            own(kv_secret="0a1b2c3d", kv_digest="a", kv_model="m"),
            own(kv_secret="3d2c1b0a", kv_digest="a", kv_model="n"),
            "the shared secret differs (DISAGG_KV_SECRET)",
        ),
        (
            own(kv_model="m", kv_digest="a" * 32),
            own(kv_model="m", kv_digest="b" * 32, tp=2),
            f"kv_model is m@{'a' * 12}, on decode m@{'b' * 12} (other weights or configuration); tp is 1, on decode 2",
        ),
    ],
)
def test_why_apart(prefill: KvKind, decode: KvKind, why: str | None) -> None:
    assert why_apart(prefill, decode) == why


def test_kinds_never_mix(world, selection) -> None:
    old = world.ready(P, 1), world.ready(D, 2)
    new = world.ready(P, 3, kind=OWN), world.ready(D, 4, kind=own())
    found = {(pair.prefill, pair.decode) for pair in (selection.choose("m") for _ in range(12))}
    assert found == {old, new} and selection.ready_pairs() == 2


def test_the_reason_of_an_incompatible_pair_names_no_address(world, selection) -> None:
    world.ready(P, 1, kind=OWN)
    world.ready(D, 2, kind=own(dtype="fp8"))
    with pytest.raises(NoPair) as caught:
        selection.choose("m")
    assert "dtype is bfloat16, on decode fp8" in str(caught.value) and "127.0.0.1" not in str(caught.value)
    assert why_no_pair(world.registry) == "dtype is bfloat16, on decode fp8" and selection.ready_pairs() == 0


def test_either(world, selection) -> None:
    decode = world.ready(D, 2, kind=OWN)
    assert selection.place("m", PlacementPreference.EITHER) == SingleEngine(decode)
    with pytest.raises(NoPair):
        selection.place("m", PlacementPreference.PAIR)
    prefill = world.ready(P, 1, kind=own())
    assert selection.place("m", PlacementPreference.EITHER) == Pair(prefill, decode)


def test_a_prefill_of_another_kind_is_as_good_as_none(world, selection) -> None:
    world.ready(P, 1)
    decode = world.ready(D, 2, kind=OWN)
    assert selection.place("m", PlacementPreference.EITHER) == SingleEngine(decode)


def test_only_decodes_that_compute_by_themselves_are_alone(world, selection) -> None:
    old = world.ready(P, 1), world.ready(D, 2)
    with pytest.raises(NoPair, match="can serve without a prefill"):
        selection.place("m", PlacementPreference.ALONE)
    assert selection.place("m", PlacementPreference.RATHER_ALONE) == Pair(*old)
    new = world.ready(D, 4, kind=OWN)
    assert (
        selection.place("m", PlacementPreference.ALONE)
        == selection.place("m", PlacementPreference.RATHER_ALONE)
        == SingleEngine(new)
    )
    with pytest.raises(UnknownModel):
        selection.place("other", PlacementPreference.ALONE)


def test_limits_apply_to_a_decode_alone_too(world, selection) -> None:
    first, second = world.ready(D, 2, kind=OWN), world.ready(D, 4, kind=OWN)
    for preference in (PlacementPreference.ALONE, PlacementPreference.RATHER_ALONE, PlacementPreference.EITHER):
        assert selection.place("m", preference, has_capacity=lambda i: i is second) == SingleEngine(second)
        with pytest.raises(NoCapacity):
            selection.place("m", preference, has_capacity=lambda i: False)
        assert selection.place("m", preference, excluded=[second]) == SingleEngine(first)
    selection.check("m", PlacementPreference.ALONE)
    with pytest.raises(NoPair):
        selection.check("m", PlacementPreference.PAIR)


def test_another_boot_id_is_another_process(world) -> None:
    decode = world.ready(D, 2, kind=OWN, boot="a")
    assert world.ping(D, 2, kind=OWN, boot="a") is None and decode.state is State.READY
    world.probes.clear()
    assert world.ping(D, 2, kind=own(), boot="b") is None
    assert (decode.state, decode.epoch, decode.boot, world.probes) == (State.PROBING, 1, "b", [decode])


def test_another_boot_id_after_missing_pings(world) -> None:
    decode = world.ready(D, 2, kind=OWN, boot="a")
    world.time += 11
    world.registry.expire()
    assert decode.state is State.LOST
    assert world.ping(D, 2, kind=OWN, boot="b") is None
    assert (decode.state, decode.epoch, decode.boot) == (State.PROBING, 1, "b")
    world.registry.admit(decode, {"m": {}})
    assert world.ping(D, 2, kind=OWN, boot="b") is None and decode.state is State.READY


def test_another_kind_on_a_live_endpoint_is_a_contradiction(world) -> None:
    decode = world.ready(D, 2, kind=OWN, boot="a")
    assert world.ping(D, 2, kind=own(tp=2), boot="b") is not None
    assert decode.kind is OWN


@pytest.mark.parametrize("boot", ["b", "a", ""])
def test_other_weights_on_a_live_endpoint_are_a_restart(world, boot: str) -> None:
    """Another process there, or one whose weights were updated in place; the same one cannot have other weights."""
    decode = world.ready(D, 2, kind=own(kv_model="m", kv_digest="x"), boot="a")
    other = own(kv_model="m", kv_digest="y")
    accepted = world.ping(D, 2, kind=other, boot=boot) is None
    assert accepted is (boot == "b") and (decode.kind == other) is accepted
    assert decode.state is (State.PROBING if accepted else State.READY)
