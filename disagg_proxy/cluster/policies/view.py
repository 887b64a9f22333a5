"""The input of a policy: the candidates' loads, the request's traits, and what relates the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Loaded(Protocol):
    """The part of an instance that a policy may read."""

    @property
    def salt(self) -> int:
        """Hash of its endpoint, the same in every process."""

    @property
    def in_flight(self) -> int:
        """Requests on it now."""

    @property
    def tokens_in_flight(self) -> int:
        """Estimated prompt tokens: to be computed on prefill, held on decode."""

    @property
    def kv_waiting_tokens(self) -> int:
        """Prompt tokens whose KV a decode with a KV buffer has not loaded."""


class Traits(NamedTuple):
    """What policies may use of one request.

    Attributes:
        tokens: estimated tokens of all its prompts; 0 when unknown.
        prefix: hashes of prefixes of its prompt of increasing length (openai/prefix_hash.py).
        size: length of that prompt, in the unit in which the prefixes are measured.
        home: hash of the part that is constant through a conversation; None without one.
        session: hash of the client's session; None without one.
    """

    tokens: int = 0
    prefix: tuple[int, ...] = ()
    size: int = 0
    home: int | None = None
    session: int | None = None


NO_TRAITS = Traits()


@dataclass(slots=True)
class View:
    """The input of one choice.

    Attributes:
        candidates: never empty.
        turn: number of the choice, for round robin.
        traits: of the request.
        uncached: for each candidate the prompt tokens that are not in its cache, as far as is known; empty without
            ``needs_prefix``: all tokens count as uncached.
        link_costs: for each candidate the extra cost of a KV transfer from the chosen prefill, in tokens of decode
            load; empty without ``needs_link_costs``.
        random: a number in [0, 1), with ``needs_random``.
        bound: affinity does not apply to candidates with more than this multiple of the mean load.
    """

    candidates: Sequence[Loaded]
    turn: int = 0
    traits: Traits = NO_TRAITS
    uncached: Sequence[int] = ()
    link_costs: Sequence[int] = ()
    random: float = 0.0
    bound: float = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy: a pure function from a view to the index of a candidate, and the parts of the view that it needs.

    Attributes:
        needs_prefix: ``uncached`` and ``traits.prefix``.
        needs_session: ``traits.session``.
        needs_link_costs: ``link_costs``.
        needs_random: ``random``.
    """

    name: str
    pick: Callable[[View], int]
    needs_prefix: bool = False
    needs_session: bool = False
    needs_link_costs: bool = False
    needs_random: bool = False

    def __call__(self, view: View) -> int:
        return self.pick(view)
