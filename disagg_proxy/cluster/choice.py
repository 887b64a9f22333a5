"""What is chosen for one attempt: a pair, or one engine alone; and who decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import Traits


class Way(Enum):
    """Where a request is prefilled; the value is used in /stats, in the access log and on the page."""

    SPLIT = "split"
    DECODE_ALONE = "decode_alone"
    PREFILL_ALONE = "prefill_alone"


@dataclass(slots=True)
class Forecast:
    """What was predicted of a request when its instances were chosen, and what is learnt from its outcome.

    Attributes:
        way: how it is served.
        computes, answers: the engines that compute its prompt, and that generate its answer.
        tokens: estimated tokens of its prompt that have to be computed.
        backlog: prompt tokens that ``computes`` had to compute before them.
        ttft, tpot: predicted seconds to the first token and between two tokens; 0: nothing was predicted.
        prefilled, sequences: at the first token the prompt tokens that ``answers`` had computed so far, and the
            requests that it generated answers for.
    """

    way: Way
    computes: Instance
    answers: Instance
    tokens: int
    backlog: int
    ttft: float = 0.0
    tpot: float = 0.0
    prefilled: int = 0
    sequences: int = 0


@dataclass(slots=True, unsafe_hash=True)
class Pair:
    """The two instances of one attempt.

    Attributes:
        prefill_tokens: prompt tokens that count as load on prefill: those it has to compute, as far as is known, and
            a share of those in its prefix cache.
        decode_tokens: prompt tokens that decode holds.
        forecast: what was predicted; None where nothing is.
    """

    prefill: Instance
    decode: Instance
    prefill_tokens: int = field(default=0, compare=False)
    decode_tokens: int = field(default=0, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.prefill} and {self.decode}"


@dataclass(slots=True, unsafe_hash=True)
class SingleEngine:
    """One engine that serves an attempt alone, whatever its role.

    Attributes:
        tokens: prompt tokens that it holds. computes: those of them that it has to compute, as far as is known.
        forecast: what was predicted; None where nothing is.
    """

    engine: Instance
    tokens: int = field(default=0, compare=False)
    computes: int = field(default=0, compare=False)
    forecast: Forecast | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.engine} alone"


class PlacementPreference(Enum):
    """Whether a pair or one engine alone serves a request."""

    PAIR = "a pair"
    EITHER = "a pair, or one engine alone if there is no pair or the proxy decides so (PLACEMENT)"
    RATHER_ALONE = "a decode alone, or a pair if no decode can"
    ALONE = "a decode alone"


class NoCapacity(Exception):
    """Every instance that could serve the request has reached its limits."""


class WouldBeLate(NoCapacity):
    """The request would miss its SLO wherever it went: it waits until an engine has nothing better to do."""


@dataclass(slots=True)
class Wish:
    """What the decision may use of one request.

    Attributes:
        output: expected tokens of its answer.
        kv: tokens of KV that it is expected to take until its end.
        arrived: clock reading of :meth:`Registry.now` at its arrival; 0 when unknown.
        late: it cannot meet its SLO any more.
    """

    output: int = 0
    kv: int = 0
    arrived: float = 0.0
    late: bool = False


class Chooser(Protocol):
    """Decides how a request is served (disagg_proxy/placement)."""

    def decide(
        self, pair: Pair | None, engines: Sequence[Instance], uncached: Sequence[int], traits: Traits, wish: Wish
    ) -> Pair | SingleEngine:
        """The pair that the policies chose, or one of ``engines`` alone.

        Args:
            pair: None where no pair has capacity.
            engines: those that can serve the request alone and have capacity.
            uncached: for each of them the prompt tokens that are not in its prefix cache, as far as is known.

        Raises:
            NoCapacity: the request has to wait.
            WouldBeLate: it has to wait, and others may overtake it.
        """


def way_of(prefill: Instance | None, answers: Instance) -> Way:
    """How an attempt on these instances is served."""
    if prefill is not None:
        return Way.SPLIT
    return Way.PREFILL_ALONE if answers.present_role is Role.PREFILL else Way.DECODE_ALONE
