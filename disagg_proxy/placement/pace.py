"""What is learnt of one engine: how fast it computes prompts, and its decode steps. Pure.

    prefill    seconds from sending to the first token: a fixed part, and a part for each prompt token that the engine
               has to compute until then, those of earlier requests included
    step       seconds between two tokens: a fixed part, a part for each request in the batch, and what the prompt
               tokens that the engine computes meanwhile add
    handover   seconds from prefill's answer to decode's first token

Tokens are counted in thousands, so that the coefficients are of similar size.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import Final

from disagg_proxy.cluster.instance import Instance
from disagg_proxy.placement.fit import ENOUGH, Fit

FAST, SLOW = 1.0, 4.0
"""Time constants of the rate at which an engine gets prompts to compute, in seconds. The higher rate of both counts: a
burst is noticed at once, and a moment without prompts does not make a busy engine look idle."""

_BUSIEST: Final = 0.9
"""Share of an engine's time that prompts take at most in a prediction of its decode steps."""

_HANDOVER_WEIGHT: Final = 1 / 16


class Pace:
    """The pace of one engine, or of all engines as the ``pool`` that each starts from.

    Attributes:
        computed: prompt tokens that it has computed so far.
        handovers: samples of ``handover``.
    """

    __slots__ = ("_fast", "_handover", "_rate_at", "_slow", "computed", "handovers", "pool", "prefill", "step")

    def __init__(self, pool: Pace | None = None) -> None:
        self.pool = pool
        self.prefill: Fit = Fit(None if pool is None else pool.prefill, from_origin=True)
        self.step: Fit = Fit(None if pool is None else pool.step)
        self._handover = 0.0
        self.handovers = 0
        self.computed = 0
        self._fast = self._slow = self._rate_at = 0.0

    @property
    def learnt(self) -> bool:
        """Whether predictions can be made."""
        return self.prefill.learnt and self.step.learnt

    # -- what happens

    def assign(self, now: float, tokens: int) -> None:
        """It gets a prompt with ``tokens`` to compute."""
        passed = self._rate_at - now
        self._fast = self._fast * exp(passed / FAST) + tokens / 1000 / FAST
        self._slow = self._slow * exp(passed / SLOW) + tokens / 1000 / SLOW
        self._rate_at = now

    def add_prefill(self, seconds: float, tokens: int, backlog: int) -> None:
        """A prompt's ``tokens`` were computed ``seconds`` after it was sent, with ``backlog`` tokens before it."""
        self.prefill.add(seconds, (tokens + backlog) / 1000)

    def add_step(self, seconds: float, running: float, tokens: float) -> None:
        """An answer had ``seconds`` between two tokens, in a batch of ``running``, while the engine computed ``tokens``
        of prompts for each token of it."""
        self.step.add(seconds, running, tokens / 1000, self.prefill.values()[1])

    def add_handover(self, seconds: float) -> None:
        """Decode's first token came ``seconds`` after prefill's answer."""
        weight = max(_HANDOVER_WEIGHT, 1 / (self.handovers + 1))
        self._handover += weight * (seconds - self._handover)
        self.handovers += 1
        if self.pool is not None:
            self.pool.add_handover(seconds)

    # -- what is predicted

    def rate(self, now: float) -> float:
        """Thousand prompt tokens a second that it got recently."""
        passed = self._rate_at - now
        return max(self._fast * exp(passed / FAST), self._slow * exp(passed / SLOW))

    def prefill_seconds(self, tokens: int, backlog: int) -> float:
        """Seconds until the first token of a prompt with ``tokens`` to compute, behind ``backlog`` tokens."""
        a, b, _ = self.prefill.values()
        return a + b * (tokens + backlog) / 1000

    def compute_seconds(self, tokens: int) -> float:
        """Seconds of its time that ``tokens`` of prompts take."""
        return self.prefill.values()[1] * tokens / 1000

    def step_seconds(self, running: int) -> float:
        """Seconds of a step for ``running`` requests, without prompts."""
        a, b, _ = self.step.values()
        return a + b * running

    @property
    def handover(self) -> float:
        """Seconds from prefill's answer to decode's first token."""
        if self.handovers >= ENOUGH or self.pool is None:
            return self._handover
        return self.pool.handover

    def report(self) -> dict[str, float | int | None]:
        """For /stats: what is learnt, None where nothing is; times in milliseconds."""
        prefill, step = self.prefill.values(), self.step.values()
        knows_prefill, knows_step = self.prefill.learnt, self.step.learnt
        return {
            "prefill_samples": self.prefill.samples,
            "prefill_tokens_per_second": round(1000 / prefill[1]) if knows_prefill and prefill[1] else None,
            "prefill_fixed_ms": round(prefill[0] * 1000, 2) if knows_prefill else None,
            "step_samples": self.step.samples,
            "step_ms": round(step[0] * 1000, 3) if knows_step else None,
            "step_per_request_ms": round(step[1] * 1000, 4) if knows_step else None,
            "step_per_1000_prompt_tokens_ms": round(step[2] * 1000, 2) if knows_step else None,
            "handover_ms": round(self.handover * 1000, 2) if self.handovers else None,
        }


class View:
    """One engine at the time of a decision: its load, and what is predicted of it.

    Attributes:
        rate: thousand prompt tokens a second that it got recently.
        backlog, running: prompt tokens that it has to compute, and answers that it generates.
        output: expected tokens of one of these answers.
        per_token: seconds for each prompt token. per_request: seconds of a step for each request in the batch.
    """

    __slots__ = (
        "_fixed", "_per_prompt", "_step", "backlog", "instance", "output", "pace", "per_request", "per_token", "rate",
        "running",
    )  # fmt: skip

    def __init__(self, instance: Instance, pace: Pace, now: float, backlog: int, running: int) -> None:
        self.instance = instance
        self.pace = pace
        self.backlog = backlog
        self.running = running
        own = instance.answering - instance.peer_counts[4]
        self.output = instance.output_tokens / own if own > 0 and instance.output_tokens else 1.0
        self.rate = pace.rate(now)
        self._fixed, per_thousand, _ = pace.prefill.values()
        self.per_token = per_thousand / 1000
        self._step, self.per_request, self._per_prompt = pace.step.values()

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds until the first token of a prompt with ``tokens`` to compute."""
        return self._fixed + self.per_token * (tokens + self.backlog)

    def token_seconds(self, running: int, rate: float = -1.0) -> float:
        """Mean seconds between two tokens in a batch of ``running``, while prompts come at ``rate``, or as recently."""
        busy = self._per_prompt * (self.rate if rate < 0.0 else rate)
        return (self._step + self.per_request * running) / (1.0 - (busy if busy < _BUSIEST else _BUSIEST))

    def prompts(self, tokens: int, seconds: float) -> float:
        """How many prompts of ``tokens`` come within ``seconds``."""
        return self.rate * 1000 * seconds / tokens if tokens else 0.0

    def spread(self, seconds: float, tokens: int, output: int) -> float:
        """By how much the mean time between two tokens of an answer of ``output`` tokens differs from ``seconds``.

        As prompts of ``tokens`` come, some answers have more of them in their time than others.
        """
        if not output:
            return 0.0
        return self.per_token * tokens * sqrt(self.prompts(tokens, output * seconds)) / output
