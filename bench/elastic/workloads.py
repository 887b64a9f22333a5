"""Requests of published shapes, as Poisson arrivals unless a workload says otherwise.

2000/128   2,000 tokens in, 128 out, nothing in common (issue 22; TensorRT-LLM's performance overview has 2,048/128)
chat       multi-turn with shared prefixes: vLLM's benchmarks/multi_turn (:mod:`bench.policies.workloads`)
long-in    long in, short out: the coding trace of Azure (Splitwise, ISCA'24), lognormal, median 1,500 in and 13 out
long-out   short in, long out: 128 in, 2,048 out, as in TensorRT-LLM's performance overview
day        arrivals move from long-in to long-out, both at the same share of what the GPUs can serve
bursts     2000/128 whose gaps are gamma-distributed with a coefficient of variation of 3 (vLLM's --burstiness 0.11)
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache

from bench.policies.workloads import chat
from bench.virtual.requests import Ask, Names, Session

Make = Callable[[float], Session]

DAY = ("long-in", "long-out")
"""Begin and end of the day."""

CODE_INPUT, CODE_OUTPUT = (1500.0, 0.8, 7500), (13.0, 0.9, 400)
"""Median, sigma and maximum."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a mean request of a workload needs.

    Attributes:
        computed: prompt tokens that a prefix cache without a limit does not have.
        attended: sum over these of the tokens in front of each.
        later: tokens generated after the first.
        read: sum over these of the tokens in front of each.
        turns: requests of one arrival.
    """

    computed: float
    attended: float
    later: float
    read: float
    turns: float = 1.0

    def mixed(self, other: Shape, weight: float) -> Shape:
        """A mean request of both, of which ``weight`` are the other's."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Shape(*((1 - weight) * mine + weight * theirs for mine, theirs in pairs))


def _fixed(tokens: int, output: int) -> Callable[[random.Random, Names, Iterator[int]], Make]:
    def maker(rng: random.Random, names: Names, session: Iterator[int]) -> Make:
        return lambda at: [_ask(at, names, session, tokens, output)]

    return maker


def _code(rng: random.Random, names: Names, session: Iterator[int]) -> Make:
    def make(at: float) -> Session:
        tokens, output = (
            max(2, min(most, round(median * rng.lognormvariate(0.0, sigma))))
            for median, sigma, most in (CODE_INPUT, CODE_OUTPUT)
        )
        return [_ask(at, names, session, tokens, output)]

    return make


def _ask(at: float, names: Names, session: Iterator[int], tokens: int, output: int) -> Ask:
    blocks = names.new(tokens)
    return Ask(at, blocks, tokens, output, len(blocks), next(session))


_MAKERS = {
    "2000/128": _fixed(2000, 128), "chat": chat, "long-in": _code, "long-out": _fixed(128, 2048),
    "bursts": _fixed(2000, 128),
}  # fmt: skip
NAMES = ("2000/128", "chat", "long-in", "long-out", "day", "bursts")


@lru_cache
def shape(name: str) -> Shape:
    """Means of a workload other than the day, over a sample of its own requests."""
    rng, seen = random.Random(name), set[int]()
    make = _MAKERS[name](rng, Names(), itertools.count())
    sessions = [make(0.0) for _ in range(500)]
    computed = attended = later = read = 0.0
    asks = list(itertools.chain.from_iterable(sessions))
    for ask in asks:
        known = 0
        for block in ask.blocks:
            if block not in seen:
                break
            known += ask.block
        known = min(known, ask.tokens - 1)
        seen.update(ask.blocks)
        fresh = ask.tokens - known
        computed, attended = computed + fresh, attended + fresh * (known + fresh / 2)
        later, read = later + ask.output - 1, read + (ask.output - 1) * (ask.tokens + ask.output / 2)
    count = len(asks)
    return Shape(computed / count, attended / count, later / count, read / count, count / len(sessions))


def arrivals(
    name: str, seed: int, seconds: float, rate: float, day_rates: tuple[float, float] = (1.0, 1.0)
) -> list[Session]:
    """Sessions in the order of their first requests.

    Args:
        rate: requests per second, on average.
        day_rates: requests per second of the two :data:`DAY` that are the same load.
    """
    rng = random.Random(f"{name} {seed}")
    names, sessions = Names(), itertools.count()
    if name == "day":
        rows = [
            _poisson(rng, _MAKERS[part](rng, names, sessions), seconds, 2 * rate * most / sum(day_rates), weight)
            for part, most, weight in zip(DAY, day_rates, (lambda x: 1 - x, lambda x: x), strict=True)
        ]
        return list(heapq.merge(*rows, key=lambda session: session[0].at))
    make = _MAKERS[name](rng, names, sessions)
    turns = shape(name).turns
    return _poisson(rng, make, seconds, rate / turns, burstiness=1 / 9 if name == "bursts" else 1.0)


def _poisson(
    rng: random.Random, make: Make, seconds: float, rate: float, weight: Callable[[float], float] = lambda x: 1.0,
    burstiness: float = 1.0,
) -> list[Session]:  # fmt: skip
    """Arrivals at up to ``rate``; ``weight``: share of it, by the share of the time that has passed."""
    found, at = [], 0.0
    while (at := at + rng.gammavariate(burstiness, 1 / rate / burstiness)) < seconds:
        if rng.random() < weight(at / seconds):
            found.append(make(at))
    return found
