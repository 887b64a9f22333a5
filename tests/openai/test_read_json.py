"""Bodies are read as the standard library reads them, whatever reads them, and what is written reads the same."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from disagg_proxy.errors import BadRequest
from disagg_proxy.openai.fields import COMPLETIONS
from disagg_proxy.openai.prepare import encode, parse_object, prepare

# -- the rule


def no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


REFUSED = "refused"


def by_rule(raw: bytes) -> str:
    """What is read, with types, the order of keys and the sign of zeros in sight."""
    try:
        value = json.loads(raw, parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError):
        return REFUSED
    return repr(value) if isinstance(value, dict) else REFUSED


def by_proxy(raw: bytes) -> str:
    try:
        return repr(parse_object(raw))
    except BadRequest:
        return REFUSED


# -- texts as nobody's encoder writes them

ODD = [
    "0", "-0", "-0.0", "0e0", "1E5", "1e+05", "1.0", "-1e-400", "1e400", "-1e999", "5e-324", "1.7976931348623159e308",
    "9007199254740993", "9007199254740993.0", "18446744073709551615", "18446744073709551616", "-9223372036854775809",
    "1" * 400, "1" * 400 + ".0", "1" * 5000, "01", "1.", ".5", "+1", "-", "1e", "0x1", "1_0", "NaN", "Infinity",
    "-Infinity", "nan", "true", "false", "null", "True", "None", "tru", "", "'a'", '"\t"', '"\x7f"', '"\x00"',
    '"\\x"', '"\\u12"', '"\\u00e9"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\/"', '"\ud800"', '"\\',
    '"\u2028"', "/**/1", "[1,]", "[,]", "{,}", "[1 2]", '{"a"}', '{"a":}', "{a:1}", "{1:1}",
]  # fmt: skip

blanks = st.text(" \t\r\n", max_size=2) | st.sampled_from(["\x0b", "\xa0", "\ufeff", "\x00"])
blank = st.one_of(st.just(""), st.just(""), st.just(""), blanks)
numbers = st.integers().map(str) | st.floats(allow_nan=False, allow_infinity=False).map(repr)
strings = st.builds(lambda text, ascii: json.dumps(text, ensure_ascii=ascii), st.text(max_size=5), st.booleans())
scalars = numbers | strings | st.sampled_from(ODD)
keys = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"é"', '"\\u00e9"', '""', '"\\ud800"']) | strings


def listed(items: list[tuple[str, str, str]], brackets: str) -> str:
    return brackets[0] + ",".join(before + item + behind for before, item, behind in items) + brackets[1]


def objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.builds(lambda key, gap, value: f"{key}{gap}:{value}", keys, blank, inner)
    return st.lists(st.tuples(blank, pairs, blank), max_size=4).map(lambda items: listed(items, "{}"))


def arrays(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(blank, inner, blank), max_size=4).map(lambda items: listed(items, "[]"))


texts = objects(st.recursive(scalars, lambda inner: objects(inner) | arrays(inner), max_leaves=12))
ENCODINGS = ["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"]


def written(text: str, encoding: str, before: str, behind: str) -> bytes:
    whole = before + text + behind
    errors = "replace" if encoding == "latin-1" else "surrogatepass"
    return whole.encode(encoding, errors)


bodies = st.builds(written, texts | scalars, st.sampled_from(ENCODINGS), blank, blank)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A body with some of its bytes lost, changed, or doubled."""
    raw = bytearray(draw(bodies))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        piece = draw(st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b"{", b"}", b",", b":", b"\xed\xa0\x80"]))
        raw[at : at + draw(st.integers(0, 2))] = piece
    return bytes(raw)


@given(bodies | mutated())
@example(b"")
@example(b" \n")
@example(b"\xef\xbb\xbf{}")
@example(b"\xef\xbb\xbf")
@example(b'{"a":"\xff"}')
@example(b'{"a":"\xc0\x80"}')
@example(b'{"a":"\xed\xa0\x80"}')
@example(b'{"\xff":1,"a":2}')
@example(b"{}\x00")
@example(b"{\x00}\x00")
def test_bodies_are_read_as_the_standard_library_reads_them(raw: bytes) -> None:
    assert by_proxy(raw) == by_rule(raw)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("around", ["%s", '{"a":%s}', '{"a":[0,%s]}', '{"a":1,"b":{"c":%s,"c":%s}}'])
def test_every_odd_value_is_read_as_the_standard_library_reads_it(value: str, around: str) -> None:
    raw = around.replace("%s", value).encode("utf-8", "surrogatepass")
    assert by_proxy(raw) == by_rule(raw)


# -- what is written

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**63)
    | st.integers(max_value=-(2**63))
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=4), values, max_size=5))
@example({"a": "\ud800", "\udc00": 10**4000, "b": -0.0})
def test_what_is_written_reads_the_same(body: dict[str, Any]) -> None:
    raw = encode(body)
    assert repr(json.loads(raw)) == repr(body)
    assert by_proxy(raw) == repr(body)


@given(texts)
def test_what_was_read_can_be_written(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    expected = by_rule(raw)
    if expected != REFUSED:
        assert repr(json.loads(encode(parse_object(raw)))) == expected


# -- depth


@pytest.mark.parametrize(("depth", "read"), [(100, True), (1_000_000, False)])
@pytest.mark.parametrize("brackets", [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth(depth: int, read: bool, brackets: tuple[bytes, bytes]) -> None:
    raw = b'{"a":' + brackets[0] * depth + b"1" + brackets[1] * depth + b"}"
    assert (by_proxy(raw) != REFUSED) is read


def test_what_is_nested_as_deeply_as_can_be_read_is_written_or_refused() -> None:
    """There is no depth at which the proxy itself fails."""
    read, refused = 100, 1_000_000
    while refused - read > 1:
        depth = (read + refused) // 2
        if by_prepare(depth) == REFUSED:
            refused = depth
        else:
            read = depth
    # What is called on the way takes some of the depth, so that the limits of reading and writing are not the same.
    assert {by_prepare(depth) for depth in range(read - 150, read + 50)} == {REFUSED, "written"}


def by_prepare(depth: int) -> str:
    try:
        prepare(COMPLETIONS, b'{"prompt":"x","vllm_xargs":' + b"[" * depth + b"]" * depth + b"}")
    except BadRequest:
        return REFUSED
    return "written"
