"""Reads a long request without its text: the rules look at no text, only at its length.

Reading and writing 64 KiB of text cost more than the rest of a request together. So ``prompt``, and ``content`` and
``text`` within ``messages``, stay as they stand in the body where they are long: :class:`msgspec.Raw`, which is written
out again byte by byte. The reader has found their ends; whether what is between is well-formed beyond that is left to
prefill, which reads it before decode does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_proxy.openai.fields import Body

LONG = 2048
"""Bytes from which on a text stays unread."""

_QUOTE, _BRACKET = ord('"'), ord("[")

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def read(raw: bytes) -> Body:
    """A JSON object in which long texts are unread.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: it is not one that can be read so; ``json`` may take it.
    """
    return {name: _value(name, value) for name, value in _object.decode(raw).items()}


def _value(name: str, value: msgspec.Raw) -> Any:
    if len(value) > LONG:
        first = memoryview(value)[0]
        if first == _QUOTE and name in ("prompt", "content", "text"):
            return value
        if first == _BRACKET and name in ("messages", "content"):
            # Messages, and the parts of one.
            return [{key: _value(key, inner) for key, inner in one.items()} for one in _objects.decode(value)]
    return msgspec.json.decode(value)


def size_of(text: msgspec.Raw) -> int:
    """Its bytes as they stand in the body, escapes included; 0 for media, as in ``size``."""
    return 0 if bytes(memoryview(text)[:6]) == b'"data:' else len(text) - 2
