"""What a policy sees: the candidates' loads, the request's traits, and what the pairing knows of both together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Loaded(Protocol):
    """What a policy may look at of an instance."""

    @property
    def salt(self) -> int:
        """A number of its endpoint's own, the same in every process."""

    @property
    def in_flight(self) -> int:
        """Requests on it now."""

    @property
    def tokens_in_flight(self) -> int:
        """Prompt tokens being computed on a prefill, prompt tokens held on a decode; estimates."""

    @property
    def kv_waiting_bytes(self) -> int:
        """KV on its way to a decode."""


class Traits(NamedTuple):
    """What is known of one request.

    Attributes:
        tokens: estimated length of its prompts, in all; 0 when unknown.
        kv_bytes: what their KV takes on decode; 0 when unknown.
        prefix: names of ever longer beginnings of its prompt (openai/prefix_hash.py), shortest first.
        size: length of that prompt in the unit in which the beginnings are measured.
        home: name of what stays the same through a conversation; None when nothing does.
        session: name of the client's session, None when it has none.
    """

    tokens: int = 0
    kv_bytes: int = 0
    prefix: tuple[int, ...] = ()
    size: int = 0
    home: int | None = None
    session: int | None = None


NO_TRAITS = Traits()


@dataclass(slots=True)
class View:
    """The snapshot of one choice.

    Attributes:
        candidates: never empty.
        turn: counts choices; gives ties and rounds their order.
        traits: of the request.
        fresh: for each candidate the prompt tokens that it has not computed before, as far as is known; empty when the
            policy did not ask for it: then all are.
        links: for each candidate what an exchange with the chosen prefill costs beyond the bytes, in tokens of decode
            load; empty when not asked for.
        random: a number in [0, 1).
        bound: how many times the mean load a candidate may have and still be chosen for affinity's sake.
    """

    candidates: Sequence[Loaded]
    turn: int = 0
    traits: Traits = NO_TRAITS
    fresh: Sequence[int] = ()
    links: Sequence[int] = ()
    random: float = 0.0
    bound: float = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """A pure function from a view to the index of a candidate, and what must be in the view.

    Attributes:
        wants_prefix: fresh tokens, and the names of the prompt's beginnings.
        wants_session: the session's name.
        wants_links: the links to the chosen prefill.
        wants_random: a random number.
    """

    name: str
    pick: Callable[[View], int]
    wants_prefix: bool = False
    wants_session: bool = False
    wants_links: bool = False
    wants_random: bool = False

    def __call__(self, view: View) -> int:
        return self.pick(view)
