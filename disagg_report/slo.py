"""The service level objective: which requests are good, and whether a rate is kept.

A request is good if TTFT and TPOT are within their limits (as in ``vllm bench serve --goodput`` and DistServe, arXiv
2401.09670). A failed request is not good.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_report.records import Shot


@dataclass(frozen=True, slots=True)
class Slo:
    """The service level objective.

    Attributes:
        ttft_ms: longest time to the first token.
        tpot_ms: longest mean time per output token after the first.
        attainment: share of the requests sent that must be good for a rate to be kept.
    """

    ttft_ms: float
    tpot_ms: float
    attainment: float

    def good(self, shot: Shot) -> bool:
        """Whether the request was answered within the limits."""
        return shot.answered and (shot.ttft_ms or 0.0) <= self.ttft_ms and shot.tpot_ms <= self.tpot_ms

    def __str__(self) -> str:
        return f"TTFT <= {self.ttft_ms:g} ms and TPOT <= {self.tpot_ms:g} ms for {self.attainment:.0%} of the requests"
