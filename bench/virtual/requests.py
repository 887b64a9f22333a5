"""Requests on a virtual clock.

A prompt is a row of named blocks: what two prompts share at their beginning has the same names.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from disagg_proxy.cluster.policies import Traits
from disagg_proxy.openai.prefix_hash import ENDS

_BYTES = 4
"""Of text, for a token."""

BLOCK = 64
"""Tokens of a block; a power of two that divides nearly every length above."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        at: seconds from the start, or from the end of the same session's last answer when ``turn`` is above 0.
        blocks, block, tokens, output: as :class:`bench.virtual.engine.Sequence`.
        home: blocks up to the end of the first message. session: who asks.
    """

    at: float
    blocks: tuple[int, ...]
    tokens: int
    output: int
    home: int
    session: int
    turn: int = 0
    block: int = BLOCK


Session = list[Ask]
"""Turns of one client in their order; the first one's ``at`` is absolute."""


class Names:
    """Block names that were not used before."""

    def __init__(self) -> None:
        self._next = itertools.count(1)

    def new(self, tokens: float) -> tuple[int, ...]:
        return tuple(next(self._next) for _ in range(max(1, round(tokens / BLOCK))))


def traits_of(ask: Ask, tokens: int) -> Traits:
    """What the policies may use of a request, whose length the proxy takes for ``tokens``."""
    names = []
    name, start = 0, 0
    per = ask.block * _BYTES
    size = ask.tokens * _BYTES
    for depth, end in enumerate(ENDS):
        if end > size:
            break
        stop = -(-end // per)
        name = hash((name, ask.blocks[start:stop])) & 0xFFFFFFFFFFFF
        names.append(name << 8 | depth)
        start = stop
    home = hash(ask.blocks[: ask.home]) & 0xFFFFFFFF
    # Here every client names its session.
    return Traits(tokens, tuple(names), size, home, ask.session)


def weighted_quantile(values: list[tuple[float, int]], share: float) -> float:
    """Quantile of sorted (value, weight) pairs."""
    left = share * sum(count for _, count in values)
    for value, count in values:
        left -= count
        if left <= 0:
            return value
    return values[-1][0] if values else 0.0
