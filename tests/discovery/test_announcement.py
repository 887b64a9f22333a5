"""Pings: the real one is read, everything else is a typed refusal."""

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.cluster.instance import Role
from disagg_proxy.cluster.kv_kind import why_apart
from disagg_proxy.connectors.disagg_kv import OPTIONAL, REQUIRED
from disagg_proxy.discovery.announcement import MAX_BYTES, Announcement, BadAnnouncement, decode

PING = {"type": "P", "http_address": "127.0.0.1:20003", "zmq_address": "127.0.0.1:21001"}


def test_the_ping_of_vllm() -> None:
    found = decode([msgpack.dumps(PING)])
    assert (found.role, found.http.text, found.kv.text) == (Role.PREFILL, "127.0.0.1:20003", "127.0.0.1:21001")
    assert decode([b"", msgpack.dumps({**PING, "type": "D"})]).role is Role.DECODE


def test_fields_of_later_versions_do_not_matter() -> None:
    assert decode([msgpack.dumps({**PING, "boot": 1})]).kv.port == 21001


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([], "malformed"),
        ([b""], "malformed"),
        ([b"\xc1"], "malformed"),
        ([msgpack.dumps(PING) + b"x"], "malformed"),
        ([b"x", msgpack.dumps(PING)], "malformed"),
        ([b"", b"", msgpack.dumps(PING)], "malformed"),
        ([b"a" * (MAX_BYTES + 1)], "oversized"),
        ([b"", b"a" * MAX_BYTES + b"b"], "oversized"),
        ([msgpack.dumps([1])], "mistyped"),
        ([msgpack.dumps("P")], "mistyped"),
        ([msgpack.dumps({**PING, "type": "X"})], "mistyped"),
        ([msgpack.dumps({**PING, "type": ["P"]})], "mistyped"),
        ([msgpack.dumps({**PING, "http_address": 5})], "mistyped"),
        ([msgpack.dumps({**PING, "zmq_address": b"127.0.0.1:1"})], "mistyped"),
        ([msgpack.dumps({**PING, "zmq_address": "127.0.0.1:1___decode_addr_6.6.6.6:6"})], "mistyped"),
        ([msgpack.dumps({**PING, "http_address": "127.0.0.1:1/x?y="})], "mistyped"),
        ([msgpack.dumps({"type": "P"})], "mistyped"),
    ],
)
def test_what_is_no_ping(frames: list[bytes], kind: str) -> None:
    with pytest.raises(BadAnnouncement) as caught:
        decode(frames)
    assert caught.value.kind == kind


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=14), inner, max_size=4),
    max_leaves=8,
)
_near_pings = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from([value, "D", "", "x:1", ":"]) | _values for name, value in PING.items()}
)


@given(st.lists(st.binary(max_size=64), max_size=4) | (_near_pings | _values).map(lambda v: [msgpack.dumps(v)]))
def test_anything_is_either_a_ping_or_refused(frames: list[bytes]) -> None:
    with contextlib.suppress(BadAnnouncement):
        assert isinstance(decode(frames), Announcement)


OWN = {
    **PING, "protocol": "disagg_kv", "protocol_version": 1, "connector_version": "0.1.0", "boot_id": "b", "tp": 1,
    "layout": "l", "dtype": "bfloat16", "block_size": 16, "block_bytes": 4096, "kv_model": "m", "transports": ["tcp"],
}  # fmt: skip


def test_the_ping_of_the_projects_own_connector() -> None:
    found = decode([msgpack.dumps(OWN)])
    assert found.kind.computes and found.boot == "b" and found.kind.transports == {"tcp"}
    assert dict(found.kind.traits) == {name: OWN[name] for name in REQUIRED}
    assert not decode([msgpack.dumps(PING)]).kind.computes
    assert not decode([msgpack.dumps({**PING, "protocol": "p2p_nccl"})]).kind.computes


def test_a_decode_names_the_transports_that_run() -> None:
    links = {"10.0.0.1:21001": "tcp; nccl failed: RuntimeError: NCCL error: invalid usage"}
    assert dict(decode([msgpack.dumps({**OWN, "kv_links": links})]).links) == links
    assert decode([msgpack.dumps(OWN)]).links == ()


def test_fields_that_only_newer_engines_have() -> None:
    digests = dict.fromkeys(OPTIONAL, "d")
    found = decode([msgpack.dumps({**OWN, **digests, "of a later release": {"a": 1}})])
    assert dict(found.kind.traits) == {**{name: OWN[name] for name in REQUIRED}, **digests}
    assert why_apart(found.kind, decode([msgpack.dumps({**OWN, "type": "D"})]).kind) is None


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in (*REQUIRED, *OPTIONAL) for value in (None, True, [1], {})),
        {"protocol": "other"}, {"protocol": None}, {"transports": "tcp"}, {"transports": [1]}, {"boot_id": 5},
        {"kv_links": "tcp"}, {"kv_links": {"a": 1}},
    ],
)  # fmt: skip
def test_own_fields_are_checked(change: dict[str, object]) -> None:
    with pytest.raises(BadAnnouncement) as caught:
        decode([msgpack.dumps({**OWN, **change})])
    assert caught.value.kind == "mistyped"
    for name in change:
        without = {key: value for key, value in OWN.items() if key != name}
        if name in REQUIRED or name == "transports":
            with pytest.raises(BadAnnouncement):
                decode([msgpack.dumps(without)])
