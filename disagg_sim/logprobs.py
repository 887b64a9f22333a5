"""Log probabilities of the simulated model: of generated tokens, and of prompts."""

from __future__ import annotations

import random

from disagg_sim.request import EngineRequest, LogprobEntry
from disagg_sim.text import Answer, Dice, seed_of
from disagg_sim.vocabulary import word_id


def token_logprobs(answer: Answer, position: int, number: int, top: int | None) -> LogprobEntry | None:
    """The chosen token and its best rivals, ``top`` entries at most but at least one; None when none were requested."""
    if top is None:
        return None
    chosen = answer.logprob(position)
    entry: LogprobEntry = {number: (chosen, 1)}
    rank = 1
    while len(entry) < max(1, top):
        rank += 1
        other = word_id(answer.dice.at(position, b"top%d" % rank))
        entry.setdefault(other, (chosen - 0.5 * rank, rank))
    return entry


def prompt_logprobs(request: EngineRequest, *, wrong: bool) -> list[LogprobEntry | None] | None:
    """Log probability of each prompt token, None for the first; None when none were requested.

    Args:
        wrong: give random values, like the uninitialised memory that vLLM returns for tokens it has not computed.
    """
    if request.sampling.prompt_logprobs is None:
        return None
    dice = Dice(seed_of(request.prompt_ids))
    noise = random.Random()
    out: list[LogprobEntry | None] = [None]
    for position, number in enumerate(request.prompt_ids[1:], start=1):
        value = -(dice.at(position, b"prompt") % 5000) / 1000
        if wrong:
            value = noise.choice((-1, 1)) * noise.uniform(1e30, 2e37)
        out.append({number: (value, 1)})
    return out
