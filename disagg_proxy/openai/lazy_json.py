"""Parses a long request without decoding its text, of which the rules need only the length.

Decoding and encoding 64 KiB of text costs more than the rest of a request. So long values of ``prompt``, and of
``content`` and ``text`` within ``messages``, stay :class:`msgspec.Raw`, which is encoded again byte by byte. Only their
ends are found; whether they are valid is left to prefill, which reads them before decode does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_proxy.openai.fields import Body

LONG = 2048
"""Longer values, in bytes, are not decoded."""

_QUOTE, _BRACKET = ord('"'), ord("[")

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])


def read(raw: bytes) -> Body:
    """A JSON object whose long texts are :class:`msgspec.Raw`.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: it cannot be parsed this way; ``json`` may accept it.
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
    """Length of an undecoded text in bytes, escapes included."""
    return len(text) - 2
