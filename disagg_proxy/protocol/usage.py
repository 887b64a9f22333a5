"""Telling the truth about cached prompt tokens.

With ``--enable-prompt-tokens-details`` vLLM adds ``usage.prompt_tokens_details.cached_tokens`` when it is above 0.
Decode counts the KV that came from prefill as cached, so its figure is about the whole prompt; what really was
cached is prefill's figure, and 0 when prefill reported none (0.9.2 - 0.23, ``entrypoints/openai``, the places that
set ``PromptTokenUsageInfo``).

The text ``"prompt_tokens_details":`` can only be that key: within a JSON string its quotes would be escaped. Its value
is looked for in the bytes right behind it and no further, so that a body is repaired in the same way however it was
cut on its way.
"""

from __future__ import annotations

import re
from typing import Final

KEY: Final = b'"prompt_tokens_details"'
_VALUE = re.compile(KEY + rb'\s*:\s*\{[^{}]*?"cached_tokens"\s*:\s*(\d{1,18})(?=\s*[,}])')
_WINDOW = 256
"""Bytes from the key's beginning within which its value has ended."""


def cached_tokens(prefill_body: bytes) -> int:
    """What prefill's answer says was cached; 0 when it says nothing."""
    found = _VALUE.search(prefill_body)
    return int(found[1]) if found else 0


def repair_usage(body: bytes, cached: int | None) -> bytes:
    """Put ``cached`` where ``body`` reports cached tokens; None leaves what is there."""
    if cached is None:
        return body
    at = body.find(KEY)
    while at >= 0:
        value = _VALUE.match(body, at, at + _WINDOW)
        if value:
            body = b"%b%d%b" % (body[: value.start(1)], cached, body[value.end(1) :])
        at = body.find(KEY, at + len(KEY))
    return body


_OUTPUT = (b'"completion_tokens"', b'"output_tokens"')
COUNT = re.compile(rb"\s*:\s*(\d{1,18})(?!\d)")
"""Behind the key of a number of tokens."""


def output_tokens(body: bytes) -> int | None:
    """Tokens that an answer says it has, in its whole body or the last piece that has a usage; None when it does not.

    vLLM writes usage behind the text (0.9.2 - 0.23, ``entrypoints/openai/protocol.py``), so the last one counts.
    """
    for key in _OUTPUT:
        at = body.rfind(key)
        # A quote behind a backslash is text that the model wrote.
        if at >= 0 and body[at - 1 : at] != b"\\" and (found := COUNT.match(body, at + len(key))):
            return int(found[1])
    return None


class UsageRepair:
    """The same for a body that arrives in pieces. Feed them in order, then :meth:`end`.

    Attributes:
        cached: may become known while the body comes.
        held: a tail that waits for its rest. While there is none, :meth:`feed` passes whole lines without
            :data:`KEY` as they are.
    """

    __slots__ = ("cached", "held")

    def __init__(self, cached: int | None) -> None:
        self.cached = cached
        self.held = b""

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now; may be empty."""
        if not self.held and piece.find(KEY) < 0 and piece.endswith(b"\n"):
            # Whole events without usage; no beginning of the key ends like that.
            return piece
        return self._pass(self.held + piece if self.held else piece, ended=False)

    def end(self) -> bytes:
        """What was held back until the body ended."""
        return self._pass(self.held, ended=True)

    def _pass(self, data: bytes, ended: bool) -> bytes:
        """Everything up to the first key whose value has not ended yet, which is held back."""
        passed: list[bytes] = []
        at = 0
        while (key := data.find(KEY, at)) >= 0:
            end = key + _WINDOW
            if not ended and len(data) < end and data.find(b"}", key) < 0:
                break
            value = _VALUE.match(data, key, end)
            if value and self.cached is not None:
                passed += data[at : value.start(1)], str(self.cached).encode()
                at = value.end(1)
            else:
                passed.append(data[at : key + len(KEY)])
                at = key + len(KEY)
        cut = key if key >= 0 else len(data) if ended else _beginning(data, at)
        self.held = data[cut:]
        return b"".join((*passed, data[at:cut])) if passed else data[:cut]


def _beginning(data: bytes, at: int) -> int:
    """Where a tail that is a beginning of the key starts; the length of ``data`` when there is none."""
    start = data.find(b'"', max(at, len(data) - len(KEY) + 1))
    while start >= 0:
        if KEY.startswith(data[start:]):
            return start
        start = data.find(b'"', start + 1)
    return len(data)
