"""Estimates the prompt tokens of a request without a tokenizer.

Token ids are counted. Text is divided by the bytes per token, learnt per model from the ``usage`` of prefill responses.
Two estimates, since errors have different consequences:

- :meth:`TokenEstimator.tokens`, the expected value, for load balancing: recent text divided by its tokens.
- :meth:`TokenEstimator.upper_bound`, for the limit on waiting KV: an underestimate overfills decode's buffer, which
  stalls the engines. It uses the bytes per token of the *densest* recent text, so that a kind of text (a language,
  JSON, base64) that is more than 1/32 of the bytes is not underestimated, even when a burst consists of that kind only.
  Until 32 KiB of text have been seen, and always where the size of the buffer is not configured, it is one token per
  byte, the maximum of a byte-level tokenizer.

Both are weighted by bytes, and one prompt counts at most 1/16 of the window. Prompts below 256 bytes update neither,
since most of their tokens may be the chat template's; they update the estimate of the template's size.

Images and sound are counted, and have a learnt estimate of their own, since their base64 says little of the tokens that
a model makes of them. A prompt with media updates nothing of text.
"""

from __future__ import annotations

from math import ceil, floor, log2
from typing import Final

from disagg_proxy.openai.fields import COMPLETIONS, Route
from disagg_proxy.openai.prepare import Prepared, PromptSize

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
"""Bytes per token outside these bounds are ignored: bytes and tokens are not of the same text (truncation)."""

_CLASSES: Final = 13
"""From _DENSEST to _EXPECTED: the upper bound assumes no looser text, whatever clients send to influence it."""

_ONE_BYTE: Final = 4
"""The class of one byte per token."""

_TEMPLATE: Final = 64.0
_MAX_TEMPLATE: Final = 256.0
"""Tokens of a chat template: the initial value, and the bound above which they stem from something else."""

_TEMPLATE_DECAY: Final = 0.98
"""Factor per short prompt."""

_MEDIUM: Final = 1024.0
_LARGE_MEDIUM: Final = 4096.0
"""Tokens of one image or sound until prefill has counted some: as expected, and as the upper bound. Vision models make
256 to 4,096 of an image of usual size, audio models about 25 a second."""

_MEDIUM_WEIGHT: Final = 1 / 16
_MEDIUM_DECAY: Final = 0.995
"""Per request with media: the weight of its tokens per medium in the expected value, and the decay of the largest."""

_BLOCK: Final = 16
"""Tokens per KV block; KV is sent in full blocks (vLLM 0.11 - 0.23, ``p2p_nccl_connector.py``)."""

_MAX_MODELS: Final = 256

_OUTPUT: Final = 256
"""Tokens of an answer until some were counted."""

_OUTPUT_WEIGHT: Final = 1 / 32


def in_blocks(tokens: int, prompts: int = 1) -> int:
    """Upper bound of the tokens in full KV blocks that ``prompts`` prompts with ``tokens`` in all take."""
    return -(-tokens // _BLOCK) * _BLOCK + (prompts - 1) * _BLOCK


class _Texts:
    """Statistics of the recent prompts of one model.

    Attributes:
        bytes_per_token: of all of them.
        densest: bytes per token of the densest kind.
        template: tokens that the chat template adds to a prompt's text.
        medium, large_medium: tokens of an image, sound or other medium: as expected, and of the largest ones.
    """

    __slots__ = (
        "_by_class", "_bytes", "_tokens", "bytes_per_token", "densest", "large_medium", "medium", "template",
    )  # fmt: skip

    def __init__(self) -> None:
        self._by_class: list[float] = [0.0] * _CLASSES
        self._by_class[_ONE_BYTE] = float(_PRIOR)
        self._bytes = float(_PRIOR)
        self._tokens = _PRIOR / _EXPECTED
        self.bytes_per_token = _EXPECTED
        self.densest = 1.0
        self.template = _TEMPLATE
        self.medium = _MEDIUM
        self.large_medium = _LARGE_MEDIUM

    def add_media(self, text: int, media: int, tokens: int) -> None:
        """Add one prompt with media, unless most of its tokens are of text, whose number is only estimated."""
        of_text = text / self.bytes_per_token
        if 2 * of_text > tokens:
            return
        each = (tokens - of_text) / media
        self.medium += _MEDIUM_WEIGHT * (each - self.medium)
        self.large_medium = max(each, self.large_medium * _MEDIUM_DECAY)

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

    def tokens(self, model: str | None, size: PromptSize) -> int:
        """Expected tokens of one request."""
        texts = self._of(model)
        tokens = size.token_ids + round(size.text / texts.bytes_per_token)
        return tokens + round(size.media * texts.medium) if size.media else tokens

    def upper_bound(
        self, model: str | None, size: PromptSize, prompts: int = 1, templated: bool = False, learnt: bool = True
    ) -> int:
        """Upper bound of the tokens in full KV blocks that one request takes.

        Args:
            prompts: sequences that the tokens belong to: prompts times choices.
            templated: whether a chat template is applied to each.
            learnt: False: one token per byte, whatever the recent text was.
        """
        tokens = size.token_ids
        if size.text or size.media:
            texts = self._of(model)
            tokens += ceil(
                size.text / (texts.densest if learnt else 1.0)
                + size.media * texts.large_medium
                + (prompts * texts.template if templated else 0.0)
            )
        return in_blocks(tokens, prompts)

    def observe(self, model: str | None, size: PromptSize, prompt_tokens: int, templated: bool = False) -> None:
        """Update the estimates with prefill's count for a single prompt: of text, or with media the one of media."""
        name = model or ""
        if size.token_ids or not (size.text or size.media) or prompt_tokens < 1:
            return
        texts = self._texts.get(name)
        if texts is None:
            if len(self._texts) >= _MAX_MODELS:
                return
            texts = self._texts[name] = _Texts()
        if size.media:
            texts.add_media(size.text, size.media, prompt_tokens)
        else:
            texts.add(size.text, prompt_tokens, templated)

    def _of(self, model: str | None) -> _Texts:
        return self._texts.get(model or "", _UNKNOWN)


class OutputEstimator:
    """Expected length of an answer: the mean of the recent ones of its model, or of all models until it has any."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._all = 0.0

    def tokens(self, model: str | None, limit: int) -> int:
        """Expected tokens of one answer, at most ``limit`` unless that is 0."""
        expected = round(self._means.get(model or "", self._all)) or _OUTPUT
        return min(expected, limit) if limit > 0 else expected

    def observe(self, model: str | None, tokens: int) -> None:
        """An answer had ``tokens``."""
        name = model or ""
        self._all += _OUTPUT_WEIGHT * (tokens - self._all) if self._all else tokens
        known = self._means.get(name)
        if known is not None:
            self._means[name] = known + _OUTPUT_WEIGHT * (tokens - known)
        elif len(self._means) < _MAX_MODELS:
            self._means[name] = tokens


class PromptSizes:
    """Estimates the sizes of prompts and answers, and updates the estimators with the engines' counts.

    Args:
        learns: whether the estimator is updated also where no decode has a KV buffer.
        trusts: whether what was learnt may lower the upper bound of a prompt's KV.
    """

    def __init__(self, learns: bool, trusts: bool) -> None:
        self._learns = False
        self.configure(learns, trusts)
        self.estimator = TokenEstimator()
        self.outputs = OutputEstimator()

    def configure(self, learns: bool, trusts: bool) -> None:
        """Change the arguments of the constructor. What is already learnt stays, and learning does not stop again."""
        self._learns = self._learns or learns
        self._trusts = trusts

    def tokens(self, prepared: Prepared) -> int:
        """Expected tokens of all prompts of a request."""
        return self.estimator.tokens(prepared.model, prepared.prompt)

    def output(self, prepared: Prepared) -> int:
        """Expected tokens of all answers of a request together."""
        return self.outputs.tokens(prepared.model, prepared.limit) * prepared.choices * prepared.prompts

    def kv_tokens(self, route: Route, prepared: Prepared) -> int:
        """Upper bound of the tokens of the KV that a request's prompts take on decode."""
        self._learns = True
        sequences = prepared.choices * prepared.prompts
        templated = route is not COMPLETIONS
        return self.estimator.upper_bound(prepared.model, prepared.prompt, sequences, templated, self._trusts)

    def record_count(self, route: Route, prepared: Prepared, tokens: int) -> int:
        """Record that prefill counted ``tokens`` (above 0) in the prompts. Returns the tokens of their KV on decode."""
        sequences = prepared.choices * prepared.prompts
        if self._learns and sequences == 1:
            self.estimator.observe(prepared.model, prepared.prompt, tokens, route is not COMPLETIONS)
        return in_blocks(tokens * prepared.choices, sequences)
