"""Telling the truth about cached prompt tokens.

With ``--enable-prompt-tokens-details`` vLLM adds ``usage.prompt_tokens_details.cached_tokens`` when it is above 0.
Decode counts the KV that came from prefill as cached, so its figure is about the whole prompt; what really was
cached is prefill's figure, and 0 when prefill reported none (0.9.2 - 0.23, ``entrypoints/openai``, the places that
set ``PromptTokenUsageInfo``).

The text ``"prompt_tokens_details":`` can only be that key: within a JSON string its quotes would be escaped.
"""

from __future__ import annotations

import re

_KEY = b'"prompt_tokens_details"'
_VALUE = re.compile(rb'(?<!\\)("prompt_tokens_details"\s*:\s*\{[^{}]*?"cached_tokens"\s*:\s*)(\d+)')
_LONGEST = 256
"""Bytes after the key within which its value has ended."""


def cached_tokens(prefill_body: bytes) -> int:
    """What prefill's answer says was cached; 0 when it says nothing."""
    found = _VALUE.search(prefill_body)
    return int(found[2]) if found else 0


def repair_usage(body: bytes, cached: int) -> bytes:
    """Put ``cached`` where ``body`` reports cached tokens."""
    if _KEY not in body:
        return body
    return _VALUE.sub(lambda match: match[1] + str(cached).encode(), body)


class UsageRepair:
    """The same for a body that arrives in pieces. Feed them in order, then :meth:`end`."""

    def __init__(self, cached: int) -> None:
        self._cached = cached
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """What may be passed on now; may be empty."""
        data = self._held + piece if self._held else piece
        cut = self._undecided(data)
        self._held = data[cut:]
        return repair_usage(data[:cut], self._cached)

    def end(self) -> bytes:
        """What was held back until the body ended."""
        held, self._held = self._held, b""
        return repair_usage(held, self._cached)

    def _undecided(self, data: bytes) -> int:
        """Where a key whose value has not ended yet, or a beginning of the key, starts; else the length."""
        key = data.rfind(_KEY)
        if key >= 0 and len(data) - key < _LONGEST and b"}" not in data[key:]:
            return key
        start = data.find(b'"', max(0, len(data) - len(_KEY) + 1))
        while start >= 0:
            if _KEY.startswith(data[start:]):
                return start
            start = data.find(b'"', start + 1)
        return len(data)
