"""Estimates the prompt tokens of a request without a tokenizer.

Token ids are counted. Text is divided by the bytes per token, learnt per model from the ``usage`` of prefill responses.
Two estimates, since errors have different consequences:

- :meth:`TokenEstimator.tokens`, the expected value, for load balancing: recent text divided by its tokens.
- :meth:`TokenEstimator.upper_bound`, for the limit on waiting KV: an underestimate overfills decode's buffer, which
  stalls the engines. It uses the bytes per token of the *densest* recent text, so that a kind of text (a language,
  JSON, base64) that is more than 1/32 of the bytes is not underestimated, even when a burst consists of that kind only.
  Until 32 KiB of text have been seen it is one token per byte, the maximum of a byte-level tokenizer.

Both are weighted by bytes, and one prompt counts at most 1/16 of the window. Prompts below 256 bytes update neither,
since most of their tokens may be the chat template's; they update the estimate of the template's size.
"""

from __future__ import annotations

from math import ceil, floor, log2
from typing import Final

from disagg_proxy.openai.fields import COMPLETIONS, Route
from disagg_proxy.openai.prepare import Prepared

_WINDOW: Final = 1 << 20
"""Size in bytes of the exponentially decaying window."""

_MAX_PROMPT_BYTES: Final = 1 << 16
"""The weight of one prompt at most."""

_MIN_PROMPT_BYTES: Final = 256
"""Shorter prompts do not update the bytes per token."""

_SHARE: Final = 1 / 32
"""Share of the window that may be denser than :meth:`TokenEstimator.upper_bound` assumes."""

_PRIOR: Final = 1024
"""Bytes that the window holds initially, as if seen at one and at :data:`_EXPECTED` bytes per token."""

_EXPECTED: Final = 4.0
"""Bytes per token, as in English."""

_STEPS: Final = 4
"""Classes of density per doubling of the bytes per token."""

_DENSEST: Final = 0.5
_LOOSEST: Final = 16.0
"""Bytes per token outside these bounds are ignored: bytes and tokens are not of the same text (media, truncation)."""

_CLASSES: Final = 13
"""From _DENSEST to _EXPECTED: the upper bound assumes no looser text, whatever clients send to influence it."""

_ONE_BYTE: Final = 4
"""The class of one byte per token."""

_TEMPLATE: Final = 64.0
_MAX_TEMPLATE: Final = 256.0
"""Tokens of a chat template: the initial value, and the bound above which they stem from something else (media)."""

_TEMPLATE_DECAY: Final = 0.98
"""Factor per short prompt."""

_BLOCK: Final = 16
"""Tokens per KV block; KV is sent in full blocks (vLLM 0.11 - 0.23, ``p2p_nccl_connector.py``)."""

_MAX_MODELS: Final = 256


def in_blocks(tokens: int, prompts: int = 1) -> int:
    """Upper bound of the tokens in full KV blocks that ``prompts`` prompts with ``tokens`` in all take."""
    return -(-tokens // _BLOCK) * _BLOCK + (prompts - 1) * _BLOCK


class _Texts:
    """Statistics of the recent prompts of one model.

    Attributes:
        bytes_per_token: of all of them.
        densest: bytes per token of the densest kind.
        template: tokens that the chat template adds to a prompt's text.
    """

    __slots__ = ("_by_class", "_bytes", "_tokens", "bytes_per_token", "densest", "template")

    def __init__(self) -> None:
        self._by_class: list[float] = [0.0] * _CLASSES
        self._by_class[_ONE_BYTE] = float(_PRIOR)
        self._bytes = float(_PRIOR)
        self._tokens = _PRIOR / _EXPECTED
        self.bytes_per_token = _EXPECTED
        self.densest = 1.0
        self.template = _TEMPLATE

    def add(self, text: int, tokens: int, templated: bool) -> None:
        """Add one prompt: its bytes and its tokens."""
        if text < _MIN_PROMPT_BYTES:
            template = tokens - text / self.densest
            if templated and template <= _MAX_TEMPLATE:
                self.template = max(template, self.template * _TEMPLATE_DECAY)
            return
        ratio = text / tokens
        if not _DENSEST <= ratio <= _LOOSEST:
            return
        weight = min(text, _MAX_PROMPT_BYTES)
        kept = 1 - weight / _WINDOW
        density = min(floor(_STEPS * log2(ratio / _DENSEST)), _CLASSES - 1)
        self._by_class = [kept * known for known in self._by_class]
        self._by_class[density] += weight
        self._bytes = kept * self._bytes + weight
        self._tokens = kept * self._tokens + weight / ratio
        self.bytes_per_token = self._bytes / self._tokens
        self.densest = self._densest()

    def _densest(self) -> float:
        """Lower bound of the densest class up to which texts exceed :data:`_SHARE` of the window."""
        left = _SHARE * self._bytes
        for density, weight in enumerate(self._by_class):
            left -= weight
            if left < 0:
                return float(_DENSEST * 2 ** (density / _STEPS))
        return _EXPECTED


_UNKNOWN: Final = _Texts()


class TokenEstimator:
    """Estimates per model, learnt from prefill responses."""

    def __init__(self) -> None:
        self._texts: dict[str, _Texts] = {}

    def tokens(self, model: str | None, token_ids: int, text_bytes: int) -> int:
        """Expected tokens of one request."""
        return token_ids + round(text_bytes / self._of(model).bytes_per_token)

    def upper_bound(
        self, model: str | None, token_ids: int, text_bytes: int, prompts: int = 1, templated: bool = False
    ) -> int:
        """Upper bound of the tokens in full KV blocks that one request takes.

        Args:
            prompts: sequences that the tokens belong to: prompts times choices.
            templated: whether a chat template is applied to each.
        """
        tokens = token_ids
        if text_bytes:
            texts = self._of(model)
            tokens += ceil(text_bytes / texts.densest + (prompts * texts.template if templated else 0.0))
        return in_blocks(tokens, prompts)

    def observe(self, model: str | None, text_bytes: int, prompt_tokens: int, templated: bool = False) -> None:
        """Update the estimates with prefill's count for a single prompt that was text only."""
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
    """Estimates the sizes of prompts, and updates the estimator with prefill's counts.

    Args:
        kv_bytes_per_token: of the served models; 0 disables the accounting of KV.
        learns: whether the estimator is updated; False when no setting depends on the estimates.
    """

    def __init__(self, kv_bytes_per_token: int, learns: bool) -> None:
        self._per_token = kv_bytes_per_token
        self._learns = learns
        self.estimator = TokenEstimator()

    def tokens(self, prepared: Prepared) -> int:
        """Expected tokens of all prompts of a request."""
        return self.estimator.tokens(prepared.model, *prepared.prompt)

    def kv_bytes_of(self, tokens: int) -> int:
        """Bytes of KV of ``tokens``; 0 when KV accounting is disabled."""
        return self._per_token * tokens

    def kv_bytes(self, route: Route, prepared: Prepared) -> int:
        """Upper bound of the bytes of KV that a request's prompts take on decode; 0 when KV accounting is disabled."""
        if not self._per_token:
            return 0
        sequences = prepared.choices * prepared.prompts
        templated = route is not COMPLETIONS
        return self._per_token * self.estimator.upper_bound(prepared.model, *prepared.prompt, sequences, templated)

    def record_count(self, route: Route, prepared: Prepared, tokens: int) -> int:
        """Record that prefill counted ``tokens`` (above 0) in the prompts. Returns their bytes of KV on decode."""
        sequences = prepared.choices * prepared.prompts
        token_ids, text_bytes = prepared.prompt
        if self._learns and not token_ids and sequences == 1:
            self.estimator.observe(prepared.model, text_bytes, tokens, route is not COMPLETIONS)
        return self._per_token * in_blocks(tokens * prepared.choices, sequences)
