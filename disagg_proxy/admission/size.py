"""How many prompt tokens a request has, guessed without a tokenizer.

Token ids are counted. Text is divided by the bytes that a token has been seen to take: every prefill answers with
``usage.prompt_tokens``, and a moving average per model follows it. Before the first answer four bytes a token are
assumed, as for English.
"""

from __future__ import annotations

_FIRST_GUESS = 4.0
_WEIGHT = 0.1
_MAX_MODELS = 256


class TokenGuess:
    """Bytes per token of each model, learnt from prefill's answers."""

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}

    def tokens(self, model: str | None, token_ids: int, text_bytes: int) -> int:
        """The best guess for one request."""
        return token_ids + round(text_bytes / self._ratios.get(model or "", _FIRST_GUESS))

    def learn(self, model: str | None, text_bytes: int, prompt_tokens: int) -> None:
        """Take in one prefill's count for a prompt that was all text."""
        name = model or ""
        if text_bytes < 1 or prompt_tokens < 1 or (name not in self._ratios and len(self._ratios) >= _MAX_MODELS):
            return
        ratio = text_bytes / prompt_tokens
        known = self._ratios.get(name)
        self._ratios[name] = ratio if known is None else known + _WEIGHT * (ratio - known)
