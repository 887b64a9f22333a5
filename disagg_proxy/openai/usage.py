"""Correcting the cached prompt tokens in ``usage``.

With ``--enable-prompt-tokens-details`` vLLM reports how much of the prompt came from a cache. Decode counts the KV that
came from prefill as cached, so its figures are about the whole prompt; the true ones are prefill's. Three spellings:

- completions and chat: ``prompt_tokens_details``, an object with ``cached_tokens`` and, on chat (0.32, 0.33),
  ``created_cache_tokens``, the tokens that were written to the prefix cache. Up to 0.23 there is none when nothing was
  cached, newer versions report 0 (``entrypoints/openai``, the places that set ``PromptTokenUsageInfo``).
- messages (0.32, 0.33, ``entrypoints/anthropic/serving.py``, ``_build_anthropic_usage``): ``cache_read_input_tokens``
  and ``cache_creation_input_tokens`` beside ``input_tokens``, which is the *rest* of the prompt. Up to 0.23
  ``input_tokens`` is the whole prompt and the others are never set. vLLM writes ``input_tokens`` first.
- responses (0.19 - 0.33, ``entrypoints/openai/responses/protocol.py``): ``input_tokens_details``, always there, with
  ``cached_tokens``, the same once more in ``cached_tokens_per_turn`` and, from 0.31 on, ``cache_write_tokens``.

The text of a key can only be that key: within a JSON string its quotes would be escaped. In a complete answer to
/v1/messages the arguments of a tool call are JSON that the model wrote, so only the last key counts there: ``usage``
follows the content. The figures are looked for in the bytes right behind the key and no further, so that a stream is
corrected in the same way however it is cut on its way.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from disagg_proxy.openai.fields import Route

_WINDOW: Final = 256
"""Bytes from the key's beginning within which its object has ended."""

_NUMBER: Final = rb'"\s*:\s*(\d{1,18})(?!\d)'


class CachedTokens(NamedTuple):
    """Prompt tokens by what prefill's cache did for them.

    Attributes:
        cached: read from it. created: written to it, None where the engine does not say.
    """

    cached: int = 0
    created: int | None = None


class _Spelling(NamedTuple):
    """How the routes of one API write the figures.

    Attributes:
        key: what is searched for. fields: the flat part of its object behind it, as the only group.
        cached, created, rest: one number each; ``rest`` is what the prompt has beyond the other two.
        turn: ``cached`` as the only number of a list.
    """

    key: bytes
    fields: re.Pattern[bytes]
    cached: re.Pattern[bytes]
    created: re.Pattern[bytes]
    rest: re.Pattern[bytes] | None = None
    turn: re.Pattern[bytes] | None = None


_OPENAI: Final = _Spelling(
    b'"prompt_tokens_details"',
    re.compile(rb'"prompt_tokens_details"\s*:\s*\{([^{}]*)[{}]'),
    re.compile(rb'"cached_tokens' + _NUMBER),
    re.compile(rb'"created_cache_tokens' + _NUMBER),
)
_ANTHROPIC: Final = _Spelling(
    b'"input_tokens"',
    re.compile(rb'("input_tokens"[^{}]*)[{}]'),
    re.compile(rb'"cache_read_input_tokens' + _NUMBER),
    re.compile(rb'"cache_creation_input_tokens' + _NUMBER),
    re.compile(rb'"input_tokens' + _NUMBER),
)


_RESPONSES: Final = _Spelling(
    b'"input_tokens_details"',
    re.compile(rb'"input_tokens_details"\s*:\s*\{([^{}]*)[{}]'),
    re.compile(rb'"cached_tokens' + _NUMBER),
    re.compile(rb'"cache_write_tokens' + _NUMBER),
    turn=re.compile(rb'"cached_tokens_per_turn"\s*:\s*\[\s*(\d{1,18})\s*\]'),
)
_OTHERS: Final = {"messages": _ANTHROPIC, "responses": _RESPONSES}


def _spelling(route: Route) -> _Spelling:
    return _OTHERS.get(route.dialect, _OPENAI)


def _found(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    match = pattern.search(text)
    return int(match[1]) if match else None


def cache_use(route: Route, prefill_body: bytes) -> CachedTokens:
    """Prefill's cache figures from its answer, streamed or not; nothing cached where it reports none."""
    spelling = _spelling(route)
    at = prefill_body.rfind(spelling.key)
    fields = spelling.fields.match(prefill_body, at, at + _WINDOW) if at >= 0 else None
    if fields is None:
        return CachedTokens()
    return CachedTokens(_found(spelling.cached, fields[1]) or 0, _found(spelling.created, fields[1]))


def tells_cache_use(route: Route, body: bytes) -> bool:
    """Whether :func:`repair_usage` may have something to correct in decode's complete answer."""
    return (b'"cache_read_input_tokens"' if route.dialect == "messages" else b'"cached_tokens"') in body


def repair_usage(route: Route, body: bytes, use: CachedTokens | None) -> bytes:
    """Decode's complete answer with its cache figures replaced by prefill's; unchanged where ``use`` is None."""
    if use is None:
        return body
    # Before the usage of these two there may be JSON of the model's, or of the client's tools.
    other = _OTHERS.get(route.dialect)
    at = 0 if other is None else max(0, body.rfind(other.key))
    repair = UsageRepair(route, use)
    return repair.finish(body) if at == 0 else body[:at] + repair.finish(body[at:])


def _corrected(spelling: _Spelling, fields: bytes, use: CachedTokens) -> bytes:
    """The flat part of a usage object with prefill's figures; unchanged where decode has no figure of its own."""
    read, created = spelling.cached.search(fields), _found(spelling.created, fields)
    if read is None:
        return fields
    now = (created or 0) if use.created is None or created is None else use.created
    rest = None if spelling.rest is None else _found(spelling.rest, fields)
    fields = b"%b%d%b" % (fields[: read.start(1)], use.cached, fields[read.end(1) :])
    if spelling.turn is not None:
        fields = _with(spelling.turn, fields, use.cached)
    if created is not None:
        fields = _with(spelling.created, fields, now)
    if spelling.rest is not None and rest is not None:
        fields = _with(spelling.rest, fields, max(0, rest + int(read[1]) + (created or 0) - use.cached - now))
    return fields


def _with(pattern: re.Pattern[bytes], text: bytes, number: int) -> bytes:
    match = pattern.search(text)
    return text if match is None else b"%b%d%b" % (text[: match.start(1)], number, text[match.end(1) :])


_OUTPUT = (b'"completion_tokens"', b'"output_tokens"')
COUNT = re.compile(rb"\s*:\s*(\d{1,18})(?!\d)")
"""The number after a key."""


def output_tokens(body: bytes) -> int | None:
    """Generated tokens according to usage, in a complete body or the last chunk with usage; None without usage.

    vLLM writes usage after the text (0.9.2 - 0.23, ``entrypoints/openai/protocol.py``), so the last one counts.
    """
    for key in _OUTPUT:
        at = body.rfind(key)
        # A quote after a backslash is within text of the model.
        if at >= 0 and body[at - 1 : at] != b"\\" and (found := COUNT.match(body, at + len(key))):
            return int(found[1])
    return None


PROMPT: Final = (b'"prompt_tokens"', _ANTHROPIC.key)
"""Keys of the prompt's length; the second is without the tokens of :func:`cached_beside`."""


def cached_beside(body: bytes, at: int) -> int:
    """Cached prompt tokens that are counted beside the key at ``at``, not in its number; 0 except on /v1/messages."""
    fields = _ANTHROPIC.fields.match(body, at, at + _WINDOW)
    if fields is None:
        return 0
    return (_found(_ANTHROPIC.cached, fields[1]) or 0) + (_found(_ANTHROPIC.created, fields[1]) or 0)


class UsageRepair:
    """:func:`repair_usage` for an event stream. Feed its chunks in order, then call :meth:`end`.

    Attributes:
        key: what an event with figures holds.
        use: prefill's figures; may be set while the body is streaming.
        held: the beginning of a key or an object that the next chunk completes. While it is empty, :meth:`feed`
            returns complete lines without :attr:`key` unchanged.
    """

    __slots__ = ("_spelling", "held", "key", "use")

    def __init__(self, route: Route, use: CachedTokens | None) -> None:
        self._spelling = _spelling(route)
        self.key: bytes = self._spelling.key
        self.use = use
        self.held = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that can be sent now; may be empty."""
        if not self.held and chunk.find(self.key) < 0 and chunk.endswith(b"\n"):
            # Complete events without usage; no beginning of the key ends like that.
            return chunk
        return self._pass(self.held + chunk if self.held else chunk, ended=False)

    def end(self) -> bytes:
        """The rest of the body that was held back."""
        return self.finish(b"")

    def finish(self, last: bytes) -> bytes:
        """The rest of the body, of which ``last`` is the last chunk."""
        return self._pass(self.held + last, ended=True)

    def _pass(self, data: bytes, ended: bool) -> bytes:
        """The data up to the first key whose object is incomplete; the rest is held back."""
        passed: list[bytes] = []
        at, length = 0, len(self.key)
        while (key := data.find(self.key, at)) >= 0:
            stop = data.find(b"}", key, key + _WINDOW)
            if stop < 0 and not ended and len(data) < key + _WINDOW:
                break
            fields = self._spelling.fields.match(data, key, stop + 1) if stop >= 0 and self.use is not None else None
            if fields is not None and self.use is not None:
                passed += data[at : fields.start(1)], _corrected(self._spelling, fields[1], self.use)
                at = fields.end(1)
            else:
                passed.append(data[at : key + length])
                at = key + length
        cut = key if key >= 0 else len(data) if ended else self._beginning(data, at)
        self.held = data[cut:]
        return b"".join((*passed, data[at:cut])) if passed else data[:cut]

    def _beginning(self, data: bytes, at: int) -> int:
        """Offset of a tail that may be the beginning of the key; ``len(data)`` when there is none."""
        start = data.find(b'"', max(at, len(data) - len(self.key) + 1))
        while start >= 0:
            if self.key.startswith(data[start:]):
                return start
            start = data.find(b'"', start + 1)
        return len(data)
