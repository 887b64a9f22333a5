"""What a placement is to achieve, and what it costs: from predicted figures to one number. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_EVEN: Final = 0.95
_SPREAD: Final = 0.1
"""In shares of a limit: the prediction that is as likely to meet it as to miss it, and the least by which the outcome
differs from the prediction."""

_TTFT: Final = 0.2
_TPOT: Final = 0.05
"""What a time to first token, and a time between two tokens, as long as the SLO count: in requests that miss theirs."""

_CALM: Final = 0.5
_RISK: Final = 5.0
"""Share of the limit from which on the time between two tokens of all engines together counts for answers on a prefill,
with the square of what is beyond it. They would have to end before it can prefill for others only."""


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
        ttft: seconds from now to its first token.
        tpot: seconds between two tokens of it. spread: by how much that usually differs.
        shared: on a prefill alone, ``tpot`` if all engines computed an equal part of all prompts; else 0.
        output: expected tokens of its answer.
        delay: seconds in all that others' answers are delayed, and the prompts behind this one.
        sharing: requests in the batch of the engine that computes the prompt, with their ``tpot_before`` and
            ``tpot_after`` it has to.
        joining: the same for the engine that generates the answer, where that is another one.
    """

    ttft: float
    tpot: float
    spread: float
    shared: float
    output: int
    delay: float
    sharing: int
    tpot_before: float
    tpot_after: float
    joining: int = 0
    joined_before: float = 0.0
    joined_after: float = 0.0


def missed(seconds: float, limit: float, spread: float = 0.0) -> float:
    """How likely a time of ``seconds``, give or take ``spread``, is to exceed ``limit``: 0 to 1; 0 without a limit."""
    width = _SPREAD * limit
    if spread > width:
        width = spread
    beyond = seconds - _EVEN * limit
    if not limit or beyond <= -width:
        return 0.0
    return 1.0 if beyond >= width else 0.5 + beyond / (2.0 * width)


def harm(goals: Goals, outlook: Outlook) -> float:
    """How many others are expected to miss the limit on the time between two tokens because of this request."""
    limit = goals.tpot
    if not limit:
        return 0.0
    lost = 0.0
    if outlook.sharing and (after := missed(outlook.tpot_after, limit)):
        lost += outlook.sharing * (after - missed(outlook.tpot_before, limit))
    if outlook.joining and (after := missed(outlook.joined_after, limit)):
        lost += outlook.joining * (after - missed(outlook.joined_before, limit))
    return lost


def cost(goals: Goals, outlook: Outlook, waited: float = 0.0) -> float:
    """What it costs to serve a request so, ``waited`` seconds after its arrival; the lowest is the best.

    With an SLO: the requests that are expected to miss it, this one and others, and then how soon its tokens come.
    Without one: seconds until the answer is complete, and seconds that others are delayed.
    """
    limit = goals.tpot
    if not limit and not goals.ttft:
        return outlook.ttft + outlook.output * outlook.tpot + outlook.delay
    late, slow = missed(waited + outlook.ttft, goals.ttft), missed(outlook.tpot, limit, outlook.spread)
    lost = late + slow - late * slow + harm(goals, outlook)
    if limit:
        share = outlook.shared / limit
        risk = _RISK * (share - _CALM) ** 2 if share > _CALM else 0.0
        return lost + risk + _TTFT * outlook.ttft / (goals.ttft or 1.0) + _TPOT * outlook.tpot / limit
    return lost + _TTFT * (outlook.ttft + outlook.output * outlook.tpot + outlook.delay) / goals.ttft
