"""What is compared: how the same GPUs are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["plain", "split", "elastic"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One use of the GPUs, an engine on each.

    Attributes:
        kind: ``plain``: engines without a KV connector, each serves requests alone; ``split``: prefill and decode;
            ``elastic``: the same engines, and the proxy's placement decides for each request.
        prefills, decodes: engines of each role; plain ones count as decodes.
        policy: of the choice among engines of a role.
        alone: share of the requests that a split gives to decode alone, evenly among the others.
        admits: whether the proxy of a split or elastic arm counts the KV that requests will take.
    """

    kind: Kind
    prefills: int
    decodes: int
    policy: str = "least_loaded"
    alone: float = 0.0
    admits: bool = True

    @property
    def name(self) -> str:
        """As in tables."""
        if self.kind == "plain":
            return "plain"
        return f"{self.prefills}P{self.decodes}D" if self.kind == "split" else "elastic"

    @property
    def gpus(self) -> int:
        """Number of engines."""
        return self.prefills + self.decodes


def arms(gpus: int) -> list[Arm]:
    """Plain engines, every static split, and elastic, which begins with half of the engines in each role."""
    splits = [Arm("split", count, gpus - count) for count in range(1, gpus)]
    return [Arm("plain", 0, gpus), *splits, Arm("elastic", gpus // 2, gpus - gpus // 2)]
