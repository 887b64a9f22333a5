"""Request bodies as bytes, made beforehand, so that making them is no part of what is measured.

Each prompt begins with tokens of its own, so that no block of it is in a prefix cache, and goes on with tokens that
all share, so that a body is a few joins.
"""

from __future__ import annotations

import random

_HEAD = 32
_FIRST, _LAST = 10, 8000
"""Token ids to draw from: ordinary ones of the benchmark's model (8,192)."""


class Body:
    """One request: for the proxy or for decode, and for prefill, which makes one token.

    Attributes:
        tokens: of the prompt.
    """

    __slots__ = ("_rest", "answer", "tokens")

    def __init__(self, rest: bytes, tokens: int, answer: int) -> None:
        self._rest = rest
        self.tokens = tokens
        self.answer = answer

    def whole(self, params: str = "") -> bytes:
        """The streamed request; ``params`` is one more field as JSON text."""
        how = b'"stream":true,"stream_options":{"include_usage":true}'
        return b'{%b%b,"max_tokens":%d,%b' % (_field(params), how, self.answer, self._rest)

    def prefill(self, params: str = "") -> bytes:
        """The same prompt for prefill, as the proxy makes it (disagg_proxy/openai/fields.py)."""
        return b'{%b"stream":false,"max_tokens":1,%b' % (_field(params), self._rest)


def _field(params: str) -> bytes:
    return f"{params},".encode() if params else b""


class Prompts:
    """Makes bodies; no two have the same beginning.

    Args:
        model: served name.
    """

    def __init__(self, model: str, seed: int) -> None:
        self._model = model
        self._dice = random.Random(seed)
        self._shared: dict[int, str] = {}

    def body(self, tokens: int, answer: int) -> Body:
        """A prompt of ``tokens`` token ids that is answered with exactly ``answer`` tokens."""
        own = min(_HEAD, tokens)
        head = ",".join(map(str, self._draw(own)))
        shared = self._shared.get(tokens)
        if shared is None:
            shared = self._shared[tokens] = "".join(f",{one}" for one in self._draw(tokens - own))
        text = f'"model":"{self._model}","temperature":0,"ignore_eos":true,"prompt":[{head}{shared}]}}'
        return Body(text.encode(), tokens, answer)

    def _draw(self, count: int) -> list[int]:
        return [self._dice.randrange(_FIRST, _LAST) for _ in range(count)]
