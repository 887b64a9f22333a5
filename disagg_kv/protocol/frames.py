"""Frames: a length, a kind, a JSON body. The only place that knows how a message lies on the wire.

A frame is ``>I`` length of what follows, one byte kind, then UTF-8 JSON (an object). Bytes of KV follow a GO frame
on the same connection when the transport is TCP; their number is in the frame, so they are never parsed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

MAX_FRAME = 64 * 1024
"""Bytes of kind and body; the largest real message (a hello) is below 2 KiB."""
_LENGTH = struct.Struct(">I")


class Kind(IntEnum):
    """What a frame says; the sender is named in brackets."""

    HELLO = 1  # [decode, control] who I am, and a nonce
    WELCOME = 2  # [prefill] who I am, the chosen transport, a nonce, proof that I know the secret
    PROOF = 3  # [decode, control] proof that I know the secret
    READY = 4  # [prefill] the connection is open
    REFUSE = 5  # [prefill] the connection is not opened, and why
    WANT = 10  # [decode] send me these blocks once you have them
    MEET = 9  # [control, to decode] connect to this prefill engine now, before a request needs it
    RELEASE = 11  # [decode] I no longer want this key; [control] forget every key of this transfer
    GO = 12  # [prefill] these blocks come now
    PART = 14  # [prefill] of a GO with parts, over NCCL: the next piece comes now
    GONE = 13  # [prefill] these blocks will not come, and why
    PING = 15  # [decode] are you alive; only where WELCOME has said "ping"
    PONG = 16  # [prefill] the answer to PING


class WireError(ValueError):
    """The other side broke the protocol; the connection has to be closed."""


def encode(kind: Kind, body: Mapping[str, Any]) -> bytes:
    """One frame. WireError if the body is too large to be accepted by the other side."""
    text = json.dumps(body, separators=(",", ":")).encode()
    if len(text) + 1 > MAX_FRAME:
        raise WireError(f"a {kind.name} frame of {len(text)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(text) + 1) + bytes([kind]) + text


def read_frame(read_exactly: Callable[[int], bytes]) -> tuple[Kind, dict[str, Any]]:
    """The next frame from a function that returns exactly the bytes asked for (or raises).

    WireError for anything that is not a frame; the length is checked before the body is asked for.
    """
    return decode_body(read_exactly(frame_length(read_exactly(_LENGTH.size))))


def frame_length(data: bytes) -> int:
    """Of what follows the first four bytes of a frame. WireError if it is not allowed."""
    (length,) = _LENGTH.unpack(data)
    if not 1 <= length <= MAX_FRAME:
        raise WireError(f"a frame of {length} bytes (1 to {MAX_FRAME} are allowed)")
    return int(length)


def decode_body(data: bytes) -> tuple[Kind, dict[str, Any]]:
    """What follows the length of a frame. WireError if it is not a kind and an object."""
    try:
        kind = Kind(data[0])
        body = json.loads(data[1:])
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a frame: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise WireError(f"the body of {kind.name} is not an object")
    return kind, body
