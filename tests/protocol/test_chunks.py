"""Chunks that are told from others by their first and last bytes."""

from __future__ import annotations

import pytest

from disagg_proxy.protocol.chunks import front_of, lone_chunk


@pytest.mark.parametrize("size", [1, 15, 16, 17, 200, 255, 256, 257, 4000])
def test_one_chunk_alone(size: int) -> None:
    front = front_of(size)
    assert lone_chunk(front + b"x" * size + b"\r\n") == len(front)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0\r\n\r\n",
        b"1\r\nx\r",
        b"1\r\nx\r\n1\r\nx\r\n",
        b"1\r\nx\r\n0\r\n\r\n",
        b"2\r\nx\r\n",
        b"A\r\n0123456789\r\n",
        b"01\r\nx\r\n",
        b"1;a\r\nx\r\n",
        b"+1\r\nx\r\n",
        b"5\r\nhello\n\n",
        b"2000\r\n" + b"x" * 0x2000 + b"\r\n",
    ],
    ids=str,
)
def test_everything_else_is_for_the_parser(data: bytes) -> None:
    assert lone_chunk(data) == 0
