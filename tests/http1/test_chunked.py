"""Complete chunks that need no parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.http1.chunked import are_complete_chunks


def chunk(size: int) -> bytes:
    return b"%x\r\n%b\n\r\n" % (size, b"x" * (size - 1))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 200, 255, 256, 257, 4000, 0x2000, 0x12345])
def test_a_chunk_alone_or_among_others(size: int) -> None:
    assert are_complete_chunks(chunk(size))
    assert are_complete_chunks(chunk(1) + chunk(size) + chunk(size) + chunk(0xABCDE))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0\r\n\r\n",
        b"2\r\nx\n\r",
        b"2\r\nx\n",
        b"2",
        b"2\r\n",
        b"2\r\nx\n\r\n0\r\n\r\n",
        b"2\r\nx\n\r\n3\r\nx\n\r\n",
        b"2\r\nx\n\r\n2\r\nxx\r\n",
        b"2\r\nx\n\r\n1",
        b"2\r\nx\r\n2\r\nx\n\r\n",
        b"3\r\nx\n\r\n",
        b"A\r\n012345678\n\r\n",
        b"02\r\nx\n\r\n",
        b"2;a\r\nx\n\r\n",
        b"+2\r\nx\n\r\n",
        b"0x2\r\nx\n\r\n",
        b"2\n\nx\n\r\n",
        b"2\r\rx\n\r\n",
        b"\r\n\r\n",
        b"5\r\nhell\n\n\n",
        b"f" * 5000,
        chunk(0x200000),
    ],
    ids=lambda data: str(data[:20]),
)
def test_anything_else_goes_to_the_parser(data: bytes) -> None:
    assert not are_complete_chunks(data)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.integers(0, 200), st.binary(max_size=3))
def test_any_changed_byte_is_noticed(chunks: list[bytes], at: int, instead: bytes) -> None:
    complete = b"".join(b"%x\r\n%b\n\r\n" % (len(data) + 1, data) for data in chunks)
    assert are_complete_chunks(complete)
    changed = complete[:at] + instead + complete[at + 1 :]
    if not are_complete_chunks(changed):
        return
    rest = changed
    while rest:
        digits, _, rest = rest.partition(b"\r\n")
        size = int(digits, 16)
        assert size and b"%x" % size == digits and rest[size - 1 : size + 2] == b"\n\r\n"
        rest = rest[size + 2 :]
