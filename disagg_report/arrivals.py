"""Arrival times and bodies of requests. Pure, and the same for every setup of a report.

Arrivals are a Poisson process conditioned on the number of requests: their times are drawn uniformly over the duration.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_UNIQUE_TOKENS = 64
_MIN_TOKEN, _MAX_TOKEN = 10, 8000
"""Range of token ids to draw from, present in any model's vocabulary."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the requests of a report have in common.

    Attributes:
        model: served name.
        seed: determines prompts and arrival times.
        seconds: duration of each rate.
        vocabulary: token ids are below it.
    """

    model: str
    input_tokens: int
    output_tokens: int
    seconds: float
    seed: int
    vocabulary: int = _MAX_TOKEN

    def count(self, rate: float) -> int:
        """Number of requests at a rate, at least two."""
        return max(2, math.ceil(rate * self.seconds))

    def dice(self, rate: float) -> random.Random:
        """Random generator of one rate."""
        return random.Random(f"{self.seed} {rate:g}")

    def arrival_times(self, rate: float) -> list[float]:
        """Sorted arrival times in seconds from the first request, which is at 0."""
        count = self.count(rate)
        dice = self.dice(rate)
        drawn = sorted(dice.uniform(0.0, count / rate) for _ in range(count))
        return [time - drawn[0] for time in drawn]

    def bodies(self, dice: random.Random, count: int) -> Sequence[bytes]:
        """Bodies of streamed completions with token ids as prompts.

        Each prompt begins with unique ids, so that no prefix cache has it. The rest is shared, which saves the client
        CPU time.
        """
        last = max(_MIN_TOKEN + 1, min(_MAX_TOKEN, self.vocabulary))
        unique = min(_UNIQUE_TOKENS, self.input_tokens)
        shared = "".join(f",{dice.randrange(_MIN_TOKEN, last)}" for _ in range(self.input_tokens - unique))
        fields = (
            f'"model":{json.dumps(self.model)},"max_tokens":{self.output_tokens},"ignore_eos":true,"temperature":0,'
            '"stream":true,"stream_options":{"include_usage":true}'
        )
        begins = (",".join(str(dice.randrange(_MIN_TOKEN, last)) for _ in range(unique)) for _ in range(count))
        return [f'{{{fields},"prompt":[{begin}{shared}]}}'.encode() for begin in begins]
