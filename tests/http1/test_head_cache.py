"""Heads that were read before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.http1.head_cache import LONGEST, HeadCache

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\nX-Request-Id: %b\r\nX-A: b\r\n\r\n"


def known(head: bytes = HEAD % (b"7", b"first")) -> HeadCache[str]:
    heads: HeadCache[str] = HeadCache()
    heads.learn(head, "this one")
    return heads


@pytest.mark.parametrize(("length", "name"), [(b"0", b"a"), (b"123456", b"a-b_c.d:e"), (b"7", b"9" * 128)])
def test_a_head_is_met_again_with_another_length_and_id(length: bytes, name: bytes) -> None:
    head = HEAD % (length, name)
    assert known().meet(head + b"body") == ("this one", len(head), int(length), name)


def test_a_head_without_an_id_is_met_too() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\n"
    heads = known(head)
    for body in (b"hello", b"world", b""):
        assert heads.meet(head + body) == ("this one", len(head), 5, b"")
    longer = head.replace(b":5", b":1234")
    assert [heads.meet(one) for one in (longer, head)] == [("this one", len(longer), 1234, b""), heads.meet(head)]


def test_what_is_learnt_anew_or_forgotten_counts_for_heads_that_were_met_before() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\n"
    heads = known(head)
    assert heads.meet(head) == ("this one", len(head), 5, b"")
    heads.learn(head.replace(b":5", b":6"), "another")
    assert heads.meet(head) == ("another", len(head), 5, b"")
    for number in range(512):
        heads.learn(HEAD.replace(b"X-A", b"X-%d" % number) % (b"1", b"a"), "others")
    assert heads.meet(head) is None


@pytest.mark.parametrize("ids", [True, False])
def test_an_id_is_told_each_time(ids: bool) -> None:
    heads: HeadCache[str] = HeadCache(ids)
    head = HEAD % (b"7", b"a")
    heads.learn(head, "this one")
    assert [heads.meet(head) for _ in range(3)] == [("this one", len(head), 7, b"a" if ids else b"")] * 3


@pytest.mark.parametrize(
    "head",
    [
        HEAD % (b"7", b"a b"),
        HEAD % (b"7", b"a\x00"),
        HEAD % (b"7", "é".encode()),
        HEAD % (b"7", b""),
        HEAD % (b"7", b"9" * 129),
        HEAD % (b"", b"a"),
        HEAD % (b"+7", b"a"),
        HEAD % (b"7 ", b"a"),
        HEAD % (b"7\r\nContent-Length: 7", b"a"),
        HEAD % (b"7\r\nTransfer-Encoding: chunked", b"a"),
        HEAD % (b"7", b"a\r\nX-Request-Id: b"),
        HEAD % (b"7" * 13, b"a"),
        (HEAD % (b"7", b"a")).replace(b"Host: x", b"Host: y"),
        (HEAD % (b"7", b"a")).replace(b"POST", b"post"),
        (HEAD % (b"7", b"a")).replace(b"Content-Length", b"content-length"),
        (HEAD % (b"7", b"a")).replace(b"X-Request-Id", b"X-Request-Ie"),
        (HEAD % (b"7", b"a")).replace(b"\r\n", b"\n"),
        b"\r\n\r\n" + HEAD % (b"7", b"a"),
        (HEAD % (b"7", b"a"))[:-2],
        b"",
    ],
)
def test_anything_else_is_not_met(head: bytes) -> None:
    assert known().meet(head) is None


@given(st.binary(max_size=40), st.integers(0, 110), st.integers(0, 20))
def test_no_change_elsewhere_is_overlooked(put_in: bytes, at: int, instead: int) -> None:
    head = HEAD % (b"7", b"first")
    changed = head[:at] + put_in + head[at + instead :]
    met = known().meet(changed)
    if met is not None:
        what, body, length, name = met
        # But for the two values, what was met is what was learnt.
        again = HEAD % (b"%d" % length, name)
        spelled = changed[:body].split(b"Content-Length: ")[1].split(b"\r\n")[0]
        assert what == "this one" and int(spelled) == length
        assert changed[:body] == again.replace(b"Content-Length: %d" % length, b"Content-Length: " + spelled)


def test_a_head_that_is_too_long_or_has_no_length_is_not_learnt() -> None:
    heads: HeadCache[str] = HeadCache()
    for head in (b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"", HEAD % (b"7", b"a" * LONGEST), HEAD[:20]):
        heads.learn(head, "never")
    assert len(heads) == 0


def test_what_is_remembered_is_bounded() -> None:
    heads: HeadCache[int] = HeadCache()
    for number in range(5000):
        heads.learn(HEAD.replace(b"X-A", b"X-%d" % number) % (b"1", b"a"), number)
    assert 0 < len(heads) <= 512
    head = HEAD.replace(b"X-Request-Id", b"X-B")
    heads.learn(head % (b"1", b"a"), 1)
    for length in range(5000):
        assert heads.meet(head % (b"%d" % length, b"a")) is not None
    assert len(heads._same) <= 512
