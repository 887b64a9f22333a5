"""What a request's answer is: one deterministic function from KV (or a prompt) to tokens.

The seed of an answer is a digest of the prompt's token ids. A prefill engine sends it as "the KV"; a decode engine
has only what it received, so wrong, missing or mixed-up KV gives another text. Tests ask :func:`expected_text`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

from disagg_sim.vocabulary import EOS_ID, GARBAGE_ID, decode, encode, word_id

SEED_BYTES = 32
_SHORTEST = 64
_SPREAD = 192

Guide = Callable[["Dice"], str]
"""A grammar: what structured outputs or a tool choice force the answer to be, given the seed's dice."""


def seed_of(prompt_ids: Sequence[int]) -> bytes:
    """The digest of a prompt that stands for its KV cache."""
    return hashlib.blake2b(array("I", prompt_ids).tobytes(), digest_size=SEED_BYTES).digest()


class Dice:
    """Numbers that depend on a seed alone: the model's only source of variety."""

    def __init__(self, seed: bytes, index: int = 0) -> None:
        self._key = seed + index.to_bytes(4, "big")
        self._thrown = 0

    def at(self, position: int, label: bytes = b"") -> int:
        """The 64-bit number of one position; asking again gives the same."""
        data = label + position.to_bytes(8, "big")
        return int.from_bytes(hashlib.blake2b(data, key=self._key, digest_size=8).digest(), "big")

    def throw(self, below: int) -> int:
        """The next number, in ``range(below)``."""
        self._thrown += 1
        return self.at(self._thrown, b"throw") % below


class Answer:
    """The tokens that one sequence generates.

    Args:
        seed: from the KV; ``index`` tells apart the sequences of one request with n > 1.
        guide: the grammar that rules the text, None for free text.
        garbage: the KV does not fit the prompt: every token is visibly wrong.
    """

    def __init__(self, seed: bytes, index: int = 0, guide: Guide | None = None, *, garbage: bool = False) -> None:
        self.dice = Dice(seed, index)
        self._garbage = garbage
        self._guided = None if guide is None or garbage else encode(guide(self.dice))
        self.natural_length = (
            len(self._guided) + 1 if self._guided is not None else _SHORTEST + self.dice.at(0, b"length") % _SPREAD
        )

    def token(self, position: int, *, may_end: bool) -> int:
        """The id at ``position`` (0 is the first generated token); EOS only where ``may_end`` allows it."""
        if position + 1 >= self.natural_length and (may_end or self._guided is not None):
            return EOS_ID
        if self._garbage:
            return GARBAGE_ID
        if self._guided is not None:
            return self._guided[position]
        return word_id(self.dice.at(position, b"token"))

    def logprob(self, position: int) -> float:
        """The log probability of the token at ``position``."""
        return -(self.dice.at(position, b"logprob") % 1000) / 1000


def expected_ids(
    prompt: str | Sequence[int],
    max_tokens: int,
    *,
    index: int = 0,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    guide: Guide | None = None,
) -> list[int]:
    """The token ids of the right answer, EOS included when the answer reaches its natural end."""
    ids = encode(prompt) if isinstance(prompt, str) else prompt
    answer = Answer(seed_of(ids), index, guide)
    out: list[int] = []
    while len(out) < max_tokens:
        may_end = not ignore_eos and len(out) + 1 > min_tokens
        out.append(answer.token(len(out), may_end=may_end))
        if out[-1] == EOS_ID:
            break
    return out


def expected_text(
    prompt: str | Sequence[int],
    max_tokens: int,
    *,
    index: int = 0,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    guide: Guide | None = None,
) -> str:
    """The right answer to ``prompt`` (text as the model sees it, or token ids), before stop strings.

    Args:
        max_tokens: the most tokens to generate.
        index: which of the n sequences.
    """
    ids = expected_ids(prompt, max_tokens, index=index, min_tokens=min_tokens, ignore_eos=ignore_eos, guide=guide)
    return decode(ids, skip_special=True)
