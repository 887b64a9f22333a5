"""Frame format: length, kind, JSON body. No other module knows how a message is encoded.

A frame is the ``>I`` length of what follows, one byte kind, then UTF-8 JSON (an object). With the TCP transport, bytes
of KV follow a GO frame on the same connection; the frame announces their number, so they are never parsed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

MAX_FRAME = 64 * 1024
"""Maximum bytes of kind and body; the largest real message (HELLO) is below 2 KiB."""
_LENGTH = struct.Struct(">I")


class Kind(IntEnum):
    """Kind of a frame. The comment names the sender in brackets."""

    HELLO = 1  # [decode, control] identity and nonce
    WELCOME = 2  # [prefill] identity, nonce, chosen transport, proof of the secret
    PROOF = 3  # [decode, control] proof of the secret
    READY = 4  # [prefill] the connection is open
    REFUSE = 5  # [prefill] the connection is rejected; reason
    WANT = 10  # [decode] send these blocks once they are computed
    MEET = 9  # [control, to decode] connect to this prefill engine now, before a request needs it
    RELEASE = 11  # [decode] this key is not needed; [control] no key of this transfer is needed
    GO = 12  # [prefill] these blocks follow
    PART = 14  # [prefill] of a GO with parts, over NCCL: the next chunk follows
    GONE = 13  # [prefill] these blocks will not be sent; reason
    PING = 15  # [decode] liveness probe; only where WELCOME had "ping"
    PONG = 16  # [prefill] the answer to PING
    DONE = 17  # [decode] of a GO over IPC: the blocks are copied
    CONFIRM = 18  # [prefill] the answer to DONE: they were valid until now


class WireError(ValueError):
    """The peer violated the protocol; the connection must be closed."""


def encode(kind: Kind, body: Mapping[str, Any]) -> bytes:
    """Encode one frame.

    Raises:
        WireError: the body is larger than the other side accepts.
    """
    text = json.dumps(body, separators=(",", ":")).encode()
    if len(text) + 1 > MAX_FRAME:
        raise WireError(f"a {kind.name} frame of {len(text)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(text) + 1) + bytes([kind]) + text


def read_frame(read_exactly: Callable[[int], bytes]) -> tuple[Kind, dict[str, Any]]:
    """Read the next frame.

    Args:
        read_exactly: returns exactly the requested number of bytes, or raises.

    Raises:
        WireError: not a frame. The length is checked before the body is read.
    """
    return decode_body(read_exactly(frame_length(read_exactly(_LENGTH.size))))


def frame_length(data: bytes) -> int:
    """Length of what follows the first four bytes of a frame.

    Raises:
        WireError: the length is out of range.
    """
    (length,) = _LENGTH.unpack(data)
    if not 1 <= length <= MAX_FRAME:
        raise WireError(f"a frame of {length} bytes (1 to {MAX_FRAME} are allowed)")
    return int(length)


def decode_body(data: bytes) -> tuple[Kind, dict[str, Any]]:
    """Decode what follows the length of a frame.

    Raises:
        WireError: not a known kind and a JSON object.
    """
    try:
        kind = Kind(data[0])
        body = json.loads(data[1:])
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a frame: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise WireError(f"the body of {kind.name} is not an object")
    return kind, body
