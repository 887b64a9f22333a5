"""When requests arrive and what they ask. Pure, and the same for every setup of a report.

Arrivals are a Poisson process at a rate, given how many there are: so many moments, drawn evenly over their time.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_OWN = 64
_FIRST, _LAST = 10, 8000
"""Token ids to draw from: ordinary ones of any model's vocabulary."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every request of a report is like.

    Attributes:
        model: served name.
        seed: other prompts and moments for another seed.
        seconds: how long each rate is sent.
        vocabulary: token ids are below it.
    """

    model: str
    input_tokens: int
    output_tokens: int
    seconds: float
    seed: int
    vocabulary: int = _LAST

    def count(self, rate: float) -> int:
        """Requests at a rate, at least two."""
        return max(2, math.ceil(rate * self.seconds))

    def dice(self, rate: float) -> random.Random:
        """Chance for one rate."""
        return random.Random(f"{self.seed} {rate:g}")

    def moments(self, rate: float) -> list[float]:
        """Seconds from the start, in order; the first is 0."""
        count = self.count(rate)
        dice = self.dice(rate)
        drawn = sorted(dice.uniform(0.0, count / rate) for _ in range(count))
        return [moment - drawn[0] for moment in drawn]

    def bodies(self, dice: random.Random, count: int) -> Sequence[bytes]:
        """Streamed completions of token ids.

        Each begins with ids of its own, so that no prefix cache has it; the rest is shared, which
        costs the client less.
        """
        last = max(_FIRST + 1, min(_LAST, self.vocabulary))
        own = min(_OWN, self.input_tokens)
        shared = "".join(f",{dice.randrange(_FIRST, last)}" for _ in range(self.input_tokens - own))
        fields = (
            f'"model":{json.dumps(self.model)},"max_tokens":{self.output_tokens},"ignore_eos":true,"temperature":0,'
            '"stream":true,"stream_options":{"include_usage":true}'
        )
        begins = (",".join(str(dice.randrange(_FIRST, last)) for _ in range(own)) for _ in range(count))
        return [f'{{{fields},"prompt":[{begin}{shared}]}}'.encode() for begin in begins]
