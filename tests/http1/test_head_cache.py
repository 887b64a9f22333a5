"""The cache of parsed heads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.http1.head_cache import MAX_HEAD_BYTES, HeadCache

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\nX-Request-Id: %b\r\nX-A: b\r\n\r\n"


def known(head: bytes = HEAD % (b"7", b"first")) -> HeadCache[str]:
    heads: HeadCache[str] = HeadCache()
    heads.put(head, "this one")
    return heads


@pytest.mark.parametrize(("length", "name"), [(b"0", b"a"), (b"123456", b"a-b_c.d:e"), (b"7", b"9" * 128)])
def test_a_head_is_found_with_another_length_and_id(length: bytes, name: bytes) -> None:
    head = HEAD % (length, name)
    assert known().get(head + b"body") == ("this one", len(head), int(length), name)


def test_a_head_without_an_id_is_found() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\n"
    heads = known(head)
    for body in (b"hello", b"world", b""):
        assert heads.get(head + body) == ("this one", len(head), 5, b"")
    longer = head.replace(b":5", b":1234")
    assert [heads.get(one) for one in (longer, head)] == [("this one", len(longer), 1234, b""), heads.get(head)]


def test_replaced_and_evicted_entries_are_not_found_through_the_exact_index() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\n"
    heads = known(head)
    assert heads.get(head) == ("this one", len(head), 5, b"")
    heads.put(head.replace(b":5", b":6"), "another")
    assert heads.get(head) == ("another", len(head), 5, b"")
    for number in range(512):
        heads.put(HEAD.replace(b"X-A", b"X-%d" % number) % (b"1", b"a"), "others")
    assert heads.get(head) is None


@pytest.mark.parametrize("ids", [True, False])
def test_the_id_of_each_message_is_returned(ids: bool) -> None:
    heads: HeadCache[str] = HeadCache(ids)
    head = HEAD % (b"7", b"a")
    heads.put(head, "this one")
    assert [heads.get(head) for _ in range(3)] == [("this one", len(head), 7, b"a" if ids else b"")] * 3


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
def test_any_other_head_is_not_found(head: bytes) -> None:
    assert known().get(head) is None


@given(st.binary(max_size=40), st.integers(0, 110), st.integers(0, 20))
def test_a_change_anywhere_else_is_a_miss(put_in: bytes, at: int, instead: int) -> None:
    head = HEAD % (b"7", b"first")
    changed = head[:at] + put_in + head[at + instead :]
    found = known().get(changed)
    if found is not None:
        what, body, length, name = found
        # Except for the two values, the head that was found is the one that was stored.
        again = HEAD % (b"%d" % length, name)
        spelled = changed[:body].split(b"Content-Length: ")[1].split(b"\r\n")[0]
        assert what == "this one" and int(spelled) == length
        assert changed[:body] == again.replace(b"Content-Length: %d" % length, b"Content-Length: " + spelled)


def test_a_head_that_is_too_long_or_has_no_length_is_not_stored() -> None:
    heads: HeadCache[str] = HeadCache()
    for head in (b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"", HEAD % (b"7", b"a" * MAX_HEAD_BYTES), HEAD[:20]):
        heads.put(head, "never")
    assert len(heads) == 0


def test_the_cache_is_bounded() -> None:
    heads: HeadCache[int] = HeadCache()
    for number in range(5000):
        heads.put(HEAD.replace(b"X-A", b"X-%d" % number) % (b"1", b"a"), number)
    assert 0 < len(heads) <= 512
    head = HEAD.replace(b"X-Request-Id", b"X-B")
    heads.put(head % (b"1", b"a"), 1)
    for length in range(5000):
        assert heads.get(head % (b"%d" % length, b"a")) is not None
    assert len(heads._exact) <= 512
