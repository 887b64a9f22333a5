"""What a placement is to achieve, and what it costs: from predicted figures to one number. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_SAFE: Final = 0.85
_LOST: Final = 1.05
"""Share of a limit up to which a prediction counts as meeting it, and from which on as missing it."""

_TTFT: Final = 0.2
_TPOT: Final = 0.05
"""What a time to first token, and a time between two tokens, as long as the SLO count: in requests that miss theirs."""


@dataclass(frozen=True, slots=True)
class Goals:
    """The SLO, in seconds; 0: none.

    Attributes:
        ttft: to the first token. tpot: mean time between two tokens.
    """

    ttft: float = 0.0
    tpot: float = 0.0


@dataclass(slots=True)
class Outlook:
    """What is predicted of one way to serve a request.

    Attributes:
        ttft: seconds from its arrival to its first token.
        tpot: seconds between two tokens of it.
        output: expected tokens of its answer.
        delay: seconds that others' answers are delayed in all.
        sharing: requests in the batch of the engine that computes the prompt, with their ``tpot_before`` and
            ``tpot_after`` it has to.
        joining: the same for the engine that generates the answer, where that is another one.
    """

    ttft: float
    tpot: float
    output: int
    delay: float
    sharing: int
    tpot_before: float
    tpot_after: float
    joining: int = 0
    joined_before: float = 0.0
    joined_after: float = 0.0


def missed(seconds: float, limit: float) -> float:
    """How likely ``seconds`` are to exceed ``limit``, 0 to 1; 0 without a limit."""
    if not limit:
        return 0.0
    share = seconds / limit
    if share <= _SAFE:
        return 0.0
    return 1.0 if share >= _LOST else (share - _SAFE) / (_LOST - _SAFE)


def cost(goals: Goals, outlook: Outlook) -> float:
    """What it costs to serve a request so; the lowest is the best.

    With an SLO: the requests that are expected to miss it, this one and others, and then how soon its tokens come.
    Without one: seconds until the answer is complete, and seconds that others are delayed.
    """
    limit = goals.tpot
    if not limit and not goals.ttft:
        return outlook.ttft + outlook.output * outlook.tpot + outlook.delay
    late, slow = missed(outlook.ttft, goals.ttft), missed(outlook.tpot, limit)
    lost = late + slow - late * slow
    if limit:
        lost += outlook.sharing * (missed(outlook.tpot_after, limit) - missed(outlook.tpot_before, limit))
        lost += outlook.joining * (missed(outlook.joined_after, limit) - missed(outlook.joined_before, limit))
        return lost + _TTFT * outlook.ttft / (goals.ttft or 1.0) + _TPOT * outlook.tpot / limit
    return lost + _TTFT * (outlook.ttft + outlook.output * outlook.tpot + outlook.delay) / goals.ttft
