"""Frames, messages and keys: what is encoded is decoded again, and nothing else is accepted."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_kv.protocol.frames import MAX_FRAME, Kind, WireError, encode, read_frame
from disagg_kv.protocol.handshake import Identity, Refused, check
from disagg_kv.protocol.keys import Key, fingerprint, parse_address, transfer_id
from disagg_kv.protocol.messages import Go, Gone, Release, Want
from tests.kv.memory import SHAPE

_KEYS = st.builds(
    Key,
    st.from_regex(r"[A-Za-z0-9_.:-]{1,128}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
)
_COUNTS = st.integers(1, 1 << 24)
_MESSAGES = st.one_of(
    st.builds(Want, _KEYS, st.integers(0, 1 << 24), _COUNTS, st.text(max_size=64)),
    st.builds(Want, _KEYS, st.integers(0, 9), st.integers(12, 99), tails=st.tuples(*[st.integers(0, 4)] * 3)),
    st.builds(Go, _KEYS, st.integers(0, 1 << 24), _COUNTS, st.booleans()),
    st.builds(Gone, _KEYS, st.text(max_size=200)),
    _KEYS.map(lambda key: Release(key.transfer, key)),
    _KEYS.map(lambda key: Release(key.transfer)),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_DECODERS: dict[Kind, Any] = {Kind.WANT: Want, Kind.GO: Go, Kind.GONE: Gone, Kind.RELEASE: Release}


def _read(data: bytes) -> tuple[Kind, dict[str, Any]]:
    stream = io.BytesIO(data)

    def exactly(count: int) -> bytes:
        got = stream.read(count)
        if len(got) < count:
            raise EOFError
        return got

    return read_frame(exactly)


@settings(deadline=None)
@given(_MESSAGES)
def test_a_message_arrives_as_it_was_sent(message: Want | Go | Gone | Release) -> None:
    kind, body = _read(message.encode())
    assert _DECODERS[kind].decode(body) == message


def test_what_releases_without_digests_send_and_read() -> None:
    want = Want(Key("t", "0" * 32), 0, 2)
    assert _read(want.encode())[1] == {"t": "t", "p": "0" * 32, "first": 0, "count": 2}, "nothing without an adapter"
    old = {name: value for name, value in SHAPE.__dict__.items() if name != "digest"}
    hello = {**Identity("decode", "b", 0, SHAPE).to_wire(), "shape": old}
    assert Identity.from_wire(hello).shape == SHAPE and SHAPE.digest is None


@pytest.mark.parametrize("digest", [5, ["a"], "a" * 65])
def test_a_digest_is_a_short_text(digest: object) -> None:
    with pytest.raises(WireError):
        Identity.from_wire(
            {**Identity("decode", "b", 0, SHAPE).to_wire(), "shape": {**SHAPE.__dict__, "digest": digest}}
        )
    with pytest.raises(WireError):
        Want.decode({"t": "t", "p": "0" * 32, "first": 0, "count": 2, "adapter": digest})


@pytest.mark.parametrize(
    ("mine", "theirs", "fit"),
    [
        (("m", "a"), ("m", "a"), True),
        (("m", "a"), ("3f8a", "a"), True),
        (("m", "a"), ("m", "b"), False),
        (("m", "a"), ("m", None), True),
        (("m", None), ("m", "a"), True),
        (("m", "a"), ("n", None), False),
        (("m", "a"), ("m", ""), True),
        (("m", ""), ("n", ""), False),
    ],
)
def test_models_are_compared_by_digest_or_else_by_name(mine: Any, theirs: Any, fit: bool) -> None:
    """None: of a release without digests. Empty: the weights could not be read."""
    here, there = (
        Identity(role, "b", 0, replace(SHAPE, model=model, digest=digest))
        for role, (model, digest) in (("prefill", mine), ("decode", theirs))
    )
    if fit:
        check(here, there)
    else:
        with pytest.raises(Refused, match=r"^model is"):
            check(here, there)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_a_wire_error_or_too_few(data: bytes) -> None:
    try:
        kind, body = _read(data)
    except (WireError, EOFError):
        return
    assert isinstance(kind, Kind) and isinstance(body, dict)


@settings(deadline=None)
@given(st.sampled_from(sorted(_DECODERS)), st.dictionaries(
    st.sampled_from(["t", "p", "first", "count", "last", "reason"]), _JSON))  # fmt: skip
def test_any_body_is_a_message_or_a_wire_error(kind: Kind, body: dict[str, Any]) -> None:
    with contextlib.suppress(WireError):
        _DECODERS[kind].decode(body)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "version", "role", "boot", "rank", "shape"]),
                       st.sampled_from(["disagg_kv", 1, "decode", "b", 0, None]) | _JSON))  # fmt: skip
def test_any_hello_is_an_identity_refused_or_a_wire_error(body: dict[str, Any]) -> None:
    with contextlib.suppress(WireError, Refused):
        Identity.from_wire(body)


def test_the_length_is_checked_before_the_body_is_read() -> None:
    with pytest.raises(WireError, match="frame of"):
        _read((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(WireError, match="frame of"):
        _read(bytes(4))


def test_deeply_nested_json_is_a_wire_error() -> None:
    text = b"[" * 60000
    with pytest.raises(WireError):
        _read((len(text) + 1).to_bytes(4, "big") + bytes([Kind.WANT]) + text)


def test_a_body_that_is_no_object_is_refused() -> None:
    text = json.dumps([1]).encode()
    with pytest.raises(WireError, match="not an object"):
        _read((len(text) + 1).to_bytes(4, "big") + bytes([Kind.GO]) + text)


def test_an_own_frame_that_would_be_refused_is_not_sent() -> None:
    with pytest.raises(WireError, match="over the limit"):
        encode(Kind.HELLO, {"x": "y" * MAX_FRAME})


@pytest.mark.parametrize("count", [True, 0, -1, 1.0, "1", (1 << 24) + 1, None])
def test_a_count_of_blocks_is_a_number_within_limits(count: object) -> None:
    with pytest.raises(WireError, match="count"):
        Want.decode({**Key("t", "0" * 32).to_wire(), "first": 0, "count": count})


@pytest.mark.parametrize("tails", [5, "1", [True], [-1], [1.5], [2, 2], [4], [0] * 257])
def test_tails_are_a_few_numbers_within_the_count(tails: object) -> None:
    with pytest.raises(WireError, match="tails"):
        Want.decode({**Key("t", "0" * 32).to_wire(), "first": 0, "count": 3, "tails": tails})


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", 5, None, "é"])
def test_not_every_text_is_a_transfer_id(name: object) -> None:
    with pytest.raises(WireError):
        transfer_id(name)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 31)), st.lists(st.text()), st.lists(st.integers(0, 1 << 31)), st.lists(st.text()))
def test_fingerprints_are_equal_exactly_for_equal_prompts(
    tokens: list[int], extras: list[str], others: list[int], other_extras: list[str]
) -> None:
    same = tokens == others and extras == other_extras
    assert (fingerprint(tokens, extras) == fingerprint(others, other_extras)) is same


def test_extras_are_not_run_together() -> None:
    assert fingerprint([1], ["ab", "c"]) != fingerprint([1], ["a", "bc"])


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:21001", ("127.0.0.1", 21001)), ("[::1]:5", ("::1", 5))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host:1", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:٣", None,
                                  "127.0.0.1:+5", ":5"])  # fmt: skip
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(WireError):
        parse_address(text)
