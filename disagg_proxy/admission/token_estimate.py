"""How many prompt tokens a request has, estimated without a tokenizer. Pure.

Token ids are counted. Text is divided by the bytes that a token takes, which every prefill's ``usage`` teaches, per
model. Two estimates, since an error means different things:

- :meth:`TokenGuess.tokens`, the likely one, for balancing load: all text lately divided by all its tokens.
- :meth:`TokenGuess.at_most`, for the limit on waiting KV, where too few tokens fill decode's buffer and freeze the
  engines. It takes the bytes per token of the *densest* text lately: a kind of text (a language, JSON, base64) that is
  more than 1/32 of the bytes is not underestimated, even where a burst is of that kind only. Until 32 KiB of text have
  been seen it is one token for each byte, the most that a byte-level tokenizer makes.

Both are weighted by bytes, and one prompt is at most 1/16 of what is remembered. Prompts below 256 bytes teach neither,
since most of their tokens may be the chat template's; they teach how many those are.
"""

from __future__ import annotations

from math import ceil, floor, log2
from typing import Final

from disagg_proxy.openai.fields import COMPLETIONS, Route
from disagg_proxy.openai.prepare import Prepared

_WINDOW: Final = 1 << 20
"""Bytes of text that are remembered, older ones less and less."""

_MOST_OF_ONE: Final = 1 << 16
_LEAST_OF_ONE: Final = 256

_SHARE: Final = 1 / 32
"""Part of the remembered bytes that may be denser than :meth:`TokenGuess.at_most` assumes."""

_PRIOR: Final = 1024
"""Bytes that are taken to have been seen at first, at the densest and at the likely bytes per token."""

_LIKELY: Final = 4.0
"""Bytes per token, as in English."""

_STEPS: Final = 4
"""Classes of density for each doubling of the bytes per token."""

_DENSEST: Final = 0.5
_LOOSEST: Final = 16.0
"""Bytes per token beyond which the bytes and the tokens were not of the same text: media, a truncated prompt."""

_CLASSES: Final = 13
"""From _DENSEST to _LIKELY: the limit takes no text to be less dense than that, whatever clients send to teach it."""

_ONE_BYTE: Final = 4
"""The class of one byte per token."""

_TEMPLATE: Final = 64.0
_LONGEST_TEMPLATE: Final = 256.0
"""Tokens of a chat template: the first guess, and the bound beyond which they are of something else (media)."""

_FORGETS: Final = 0.98

_BLOCK: Final = 16
"""Tokens of KV that are sent together (vLLM 0.11 - 0.23, ``p2p_nccl_connector.py``: whole blocks)."""

_MAX_MODELS: Final = 256


def in_blocks(tokens: int, prompts: int = 1) -> int:
    """Tokens whose KV so many prompts with ``tokens`` in all take at most, in whole blocks."""
    return -(-tokens // _BLOCK) * _BLOCK + (prompts - 1) * _BLOCK


class _Texts:
    """What prompts of one model were like lately.

    Attributes:
        bytes_per_token: of all of them. densest: of the densest kind.
        template: tokens that the chat template adds to a prompt's text.
    """

    __slots__ = ("_by_class", "_bytes", "_tokens", "bytes_per_token", "densest", "template")

    def __init__(self) -> None:
        self._by_class: list[float] = [0.0] * _CLASSES
        self._by_class[_ONE_BYTE] = float(_PRIOR)
        self._bytes = float(_PRIOR)
        self._tokens = _PRIOR / _LIKELY
        self.bytes_per_token = _LIKELY
        self.densest = 1.0
        self.template = _TEMPLATE

    def add(self, text: int, tokens: int, templated: bool) -> None:
        """One prompt: its bytes and its tokens."""
        if text < _LEAST_OF_ONE:
            template = tokens - text / self.densest
            if templated and template <= _LONGEST_TEMPLATE:
                self.template = max(template, self.template * _FORGETS)
            return
        ratio = text / tokens
        if not _DENSEST <= ratio <= _LOOSEST:
            return
        weight = min(text, _MOST_OF_ONE)
        kept = 1 - weight / _WINDOW
        its_class = min(floor(_STEPS * log2(ratio / _DENSEST)), _CLASSES - 1)
        self._by_class = [kept * known for known in self._by_class]
        self._by_class[its_class] += weight
        self._bytes = kept * self._bytes + weight
        self._tokens = kept * self._tokens + weight / ratio
        self.bytes_per_token = self._bytes / self._tokens
        self.densest = self._densest()

    def _densest(self) -> float:
        """The lower end of the class with which the dense ones exceed their share."""
        left = _SHARE * self._bytes
        for its_class, weight in enumerate(self._by_class):
            left -= weight
            if left < 0:
                return float(_DENSEST * 2 ** (its_class / _STEPS))
        return _LIKELY


_UNKNOWN: Final = _Texts()


class TokenGuess:
    """Estimates for each model, learnt from prefill's answers."""

    def __init__(self) -> None:
        self._texts: dict[str, _Texts] = {}

    def tokens(self, model: str | None, token_ids: int, text_bytes: int) -> int:
        """The likely number of tokens of one request."""
        return token_ids + round(text_bytes / self._of(model).bytes_per_token)

    def at_most(
        self, model: str | None, token_ids: int, text_bytes: int, prompts: int = 1, templated: bool = False
    ) -> int:
        """Tokens whose KV one request should take at most, in whole blocks.

        Args:
            prompts: how many sequences share the tokens: prompts times choices.
            templated: whether a chat template is put around each.
        """
        tokens = token_ids
        if text_bytes:
            texts = self._of(model)
            tokens += ceil(text_bytes / texts.densest + (prompts * texts.template if templated else 0.0))
        return in_blocks(tokens, prompts)

    def learn(self, model: str | None, text_bytes: int, prompt_tokens: int, templated: bool = False) -> None:
        """Take in one prefill's count for a single prompt that was all text."""
        name = model or ""
        if text_bytes < 1 or prompt_tokens < 1:
            return
        texts = self._texts.get(name)
        if texts is None:
            if len(self._texts) >= _MAX_MODELS:
                return
            texts = self._texts[name] = _Texts()
        texts.add(text_bytes, prompt_tokens, templated)

    def _of(self, model: str | None) -> _Texts:
        return self._texts.get(model or "", _UNKNOWN)


class PromptSizes:
    """Sizes prompts, and learns from prefill's counts.

    Args:
        kv_bytes_per_token: of the models that are served, 0 where KV is not counted.
        learns: whether a setting depends on the estimates, so that counts are taken in.
    """

    def __init__(self, kv_bytes_per_token: int, learns: bool) -> None:
        self._per_token = kv_bytes_per_token
        self._learns = learns
        self.guess = TokenGuess()

    def tokens(self, prepared: Prepared) -> int:
        """The likely length of all prompts of a request together."""
        return self.guess.tokens(prepared.model, *prepared.prompt)

    def kv_of(self, tokens: int) -> int:
        """Bytes of KV of so many tokens; 0 where KV is not counted."""
        return self._per_token * tokens

    def kv_bytes(self, route: Route, prepared: Prepared) -> int:
        """Bytes of KV that the prompts of a request take on decode at most; 0 where KV is not counted."""
        if not self._per_token:
            return 0
        sequences = prepared.choices * prepared.prompts
        templated = route is not COMPLETIONS
        return self._per_token * self.guess.at_most(prepared.model, *prepared.prompt, sequences, templated)

    def counted(self, route: Route, prepared: Prepared, tokens: int) -> int:
        """Take in that prefill counted ``tokens``, more than 0, in the prompts. Returns their bytes of KV on decode."""
        sequences = prepared.choices * prepared.prompts
        token_ids, text_bytes = prepared.prompt
        if self._learns and not token_ids and sequences == 1:
            self.guess.learn(prepared.model, text_bytes, tokens, route is not COMPLETIONS)
        return self._per_token * in_blocks(tokens * prepared.choices, sequences)
