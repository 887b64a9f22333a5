"""The size of each request's prompts, in tokens and in bytes of KV on decode: estimated on its arrival, corrected when
prefill has counted them. The estimates themselves: :mod:`disagg_proxy.admission.token_estimate`."""

from __future__ import annotations

from disagg_proxy.admission.token_estimate import TokenGuess, in_blocks
from disagg_proxy.openai.fields import COMPLETIONS, Route
from disagg_proxy.openai.prepare import Prepared


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
