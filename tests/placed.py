"""A placement that a test dictates, in place of the decision of PLACEMENT=elastic."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_proxy.cluster.choice import NoCapacity, Pair, SingleEngine, Way, Wish
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import Traits
from tests.conftest import Proxy

ALONE = (Way.DECODE_ALONE, Way.PREFILL_ALONE)


class Dictated:
    """Every request goes ``way``; where no engine can, to the pair."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def decide(
        self, pair: Pair | None, engines: Sequence[Instance], uncached: Sequence[int], traits: Traits, wish: Wish
    ) -> Pair | SingleEngine:
        role = Role.PREFILL if self.way is Way.PREFILL_ALONE else Role.DECODE
        found = [engine for engine in engines if engine.role is role]
        if self.way is not Way.SPLIT and found:
            engine = min(found, key=lambda e: (e.in_flight, e.requests_total))
            return SingleEngine(engine, traits.tokens, traits.tokens)
        if pair is None:
            raise NoCapacity
        return pair


def dictate(proxy: Proxy, way: Way) -> None:
    """Place every request of ``proxy`` this way from now on."""
    proxy.services.selection.set_chooser(Dictated(way))
