"""Which instances serve a request: the policies choose among the candidates, and one engine alone may do better."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from disagg_proxy.cluster.candidates import Candidates
from disagg_proxy.cluster.choice import Chooser, NoCapacity, Pair, PlacementPreference, SingleEngine, Wish
from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import NO_TRAITS, Policy, Traits, View
from disagg_proxy.cluster.policies.joint import COLD_TOKENS
from disagg_proxy.cluster.policies.table import CACHED_LOAD_DIVISOR, PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.unavailable import NO_STANDALONE_DECODE, missing_roles, no_candidates
from disagg_proxy.errors import NoPair, UnknownModel

__all__ = ["NoCapacity", "Pair", "PlacementPreference", "Selection", "SingleEngine"]


_MOST_ALONE = 8
"""Engines that one decision compares, in turn."""


class Selection:
    """Chooses the instances of each attempt, with one policy per role.

    Args:
        table: the prefixes that each prefill has computed; needed by a policy with ``needs_prefix``.
        bound: the load bound of :class:`View`.
        random: returns numbers in [0, 1).

    Attributes:
        distance: extra cost of moving KV from a prefill to a decode, in tokens of decode load; None while the location
            of instances is unknown. Its results must not change without ``registry.version``.
    """

    def __init__(
        self,
        registry: Registry,
        prefill_policy: Policy,
        decode_policy: Policy,
        *,
        table: PrefixTable | None = None,
        bound: float = 2.0,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        self._registry = registry
        self._prefixes = table
        self.set_policies(prefill_policy, decode_policy, bound)
        self._random = random
        self._turn = 0
        self._candidates = Candidates(registry)
        self.distance: Callable[[Instance, Instance], int] | None = None
        self._chooser: Chooser | None = None

    def set_policies(self, prefill: Policy, decode: Policy, bound: float) -> None:
        """Choose by these policies from now on; arguments as for the constructor."""
        self._prefill_policy = prefill
        self._decode_policy = decode
        self._table = self._prefixes if prefill.needs_prefix else None
        self._bound = bound

    @property
    def chooser(self) -> Chooser | None:
        """Decides for each request whether the chosen pair or one engine alone serves it; None: the pair."""
        return self._chooser

    def set_chooser(self, chooser: Chooser | None) -> None:
        """Decide by ``chooser`` from now on."""
        self._chooser = chooser
        self._candidates.prefills_alone = chooser is not None

    @property
    def needs_prefix(self) -> bool:
        """Whether a policy needs the hashes of a prompt's prefixes."""
        return self._prefill_policy.needs_prefix

    @property
    def needs_session(self) -> bool:
        """Whether a policy needs the hash of the client's session."""
        return self._prefill_policy.needs_session or self._decode_policy.needs_session

    def choose(
        self,
        model: str | None,
        excluded: Collection[Instance] = (),
        has_capacity: Callable[[Instance], bool] | None = None,
        traits: Traits = NO_TRAITS,
    ) -> Pair:
        """Choose a pair for ``model``; None is the instances' own default model, as in vLLM.

        Args:
            excluded: instances on which earlier attempts of this request failed.
            has_capacity: whether an instance may get one more request; None: all may.
            traits: what the policies may use of the request.

        Raises:
            UnknownModel: no ready instance of either role serves it.
            NoPair: every prefill or every decode that serves it is missing, drained or ejected.
            NoCapacity: all instances that could serve it have reached their limits.
        """
        pair = self._choose(model, excluded, has_capacity, traits)
        self._chosen(traits, pair.prefill)
        return pair

    def _chosen(self, traits: Traits, computes: Instance) -> None:
        """``computes`` gets the prompt."""
        self._turn += 1
        if self._table is not None:
            self._table.record(traits, computes)

    def _choose(
        self,
        model: str | None,
        excluded: Collection[Instance],
        has_capacity: Callable[[Instance], bool] | None,
        traits: Traits,
    ) -> Pair:
        pair = None if excluded else self._choose_cached(model, has_capacity, traits)
        if pair is None:
            prefills, decodes = self._candidates.available(model, excluded)
            if has_capacity is not None:
                decodes = [i for i in decodes if has_capacity(i)]
                prefills = self._candidates.with_partner([i for i in prefills if has_capacity(i)], decodes)
                if not prefills:
                    raise NoCapacity
            prefill, uncached = self._pick_prefill(prefills, traits)
            partners = [i for i in decodes if self._registry.kv_compatibility.compatible(prefill, i)]
            decode = self._pick_decode(prefill, partners, traits)
            pair = Pair(prefill, decode, uncached, traits.tokens)
        return pair

    def _choose_cached(
        self, model: str | None, has_capacity: Callable[[Instance], bool] | None, traits: Traits
    ) -> Pair | None:
        """The fast path: the pair that the policies choose among the cached candidates.

        None when there are no candidates, or when a chosen instance has no capacity or an open circuit breaker.
        """
        plan = self._candidates.plan(model)
        if plan is None:
            return None
        if len(plan.prefills) == 1 and not traits.prefix:
            prefill, uncached = plan.prefills[0], traits.tokens
        else:
            prefill, uncached = self._pick_prefill(plan.prefills, traits)
        if not self._can_take(prefill, has_capacity):
            return None
        partners = plan.partners[prefill]
        if len(partners) == 1:
            decode = partners[0]
        else:
            decode = self._pick_decode(prefill, partners, traits, connected=plan.connected[prefill])
        return Pair(prefill, decode, uncached, traits.tokens) if self._can_take(decode, has_capacity) else None

    def _can_take(self, instance: Instance, has_capacity: Callable[[Instance], bool] | None) -> bool:
        if has_capacity is not None and not has_capacity(instance):
            return False
        breaker = instance.breaker
        if breaker.healthy:
            return True
        now = self._registry.now()
        return breaker.permits(now) and not breaker.busy(now)

    def _pick_prefill(self, prefills: Sequence[Instance], traits: Traits) -> tuple[Instance, int]:
        """One of ``prefills``, and the prompt tokens that count as load on it."""
        policy = self._prefill_policy
        view = View(prefills, self._turn, traits, bound=self._bound)
        if self._table is not None and traits.tokens:
            view.uncached = self._table.uncached_tokens(traits, prefills)
        if policy.needs_random:
            view.random = self._random()
        index = policy.pick(view)
        if not view.uncached:
            return prefills[index], traits.tokens
        uncached = view.uncached[index]
        return prefills[index], uncached + (traits.tokens - uncached) // CACHED_LOAD_DIVISOR

    def _pick_decode(
        self, prefill: Instance | None, decodes: Sequence[Instance], traits: Traits, connected: bool = False
    ) -> Instance:
        if len(decodes) == 1:
            return decodes[0]
        policy = self._decode_policy
        view = View(decodes, self._turn, traits, bound=self._bound)
        if policy.needs_link_costs and prefill is not None and not (connected and self.distance is None):
            view.link_costs = self._link_costs(prefill, decodes)
        if policy.needs_random:
            view.random = self._random()
        return decodes[policy.pick(view)]

    def _link_costs(self, prefill: Instance, decodes: Sequence[Instance]) -> Sequence[int]:
        connected, distance = self._registry.kv_compatibility.connected, self.distance
        costs = [0 if connected(prefill, d) else COLD_TOKENS for d in decodes]
        return costs if distance is None else [c + distance(prefill, d) for c, d in zip(costs, decodes, strict=True)]

    def place(
        self,
        model: str | None,
        preference: PlacementPreference,
        excluded: Collection[Instance] = (),
        has_capacity: Callable[[Instance], bool] | None = None,
        traits: Traits = NO_TRAITS,
        wish: Wish | None = None,
    ) -> Pair | SingleEngine:
        """Choose a pair or one engine alone, as ``preference`` says; arguments and errors as for :meth:`choose`.

        Raises:
            WouldBeLate: see :class:`Chooser`.
        """
        if preference in (PlacementPreference.ALONE, PlacementPreference.RATHER_ALONE) and (
            preference is PlacementPreference.ALONE or self.standalone_engines(model, excluded)
        ):
            return self._choose_standalone(model, excluded, has_capacity, traits)
        try:
            if self._chooser is not None and preference is PlacementPreference.EITHER and not excluded:
                return self._decide(self._chooser, model, has_capacity, traits, wish or Wish())
            return self.choose(model, excluded, has_capacity, traits)
        except NoPair:
            if preference is PlacementPreference.PAIR or not self.standalone_engines(model, excluded):
                raise
            return self._choose_standalone(model, excluded, has_capacity, traits)

    def _decide(
        self,
        chooser: Chooser,
        model: str | None,
        has_capacity: Callable[[Instance], bool] | None,
        traits: Traits,
        wish: Wish,
    ) -> Pair | SingleEngine:
        """What ``chooser`` decides between the pair that the policies choose and each engine alone."""
        pair: Pair | None = None
        with suppress(NoCapacity):
            pair = self._choose(model, (), has_capacity, traits)
        plan = self._candidates.plan(model)
        able = () if plan is None else plan.alone
        if len(able) > _MOST_ALONE:
            # The cost of a decision must not grow with the number of engines.
            begin = self._turn % len(able)
            able = [*able[begin:], *able[:begin]][:_MOST_ALONE]
        alone = [i for i in able if self._can_take(i, has_capacity)]
        table = self._table
        if table is not None and traits.tokens:
            uncached = table.uncached_tokens(traits, alone)
        else:
            uncached = [traits.tokens] * len(alone)
        found: Pair | SingleEngine
        if pair is not None and not (alone and pair.decode.kind.either_alone):
            found = pair
        else:
            found = chooser.decide(pair, alone, uncached, traits, wish)
        if isinstance(found, SingleEngine):
            self._chosen(traits, found.engine)
        else:
            self._chosen(traits, found.prefill)
            if table is not None:
                # Decode keeps the blocks that it fetches, as if it had computed them.
                table.record(traits, found.decode)
        return found

    def check(
        self,
        model: str | None,
        preference: PlacementPreference = PlacementPreference.PAIR,
        excluded: Collection[Instance] = (),
    ) -> None:
        """Raise the errors of :meth:`place` that do not depend on capacity, without choosing."""
        if preference is not PlacementPreference.PAIR and self.standalone_engines(model, excluded):
            return
        self._candidates.available(model, excluded)

    def _choose_standalone(
        self,
        model: str | None,
        excluded: Collection[Instance],
        has_capacity: Callable[[Instance], bool] | None,
        traits: Traits,
    ) -> SingleEngine:
        able = self.standalone_engines(model, excluded)
        if not able:
            error = no_candidates(self._registry, model, (), ())
            if isinstance(error, UnknownModel) or missing_roles(self._registry):
                raise error
            raise NoPair([NO_STANDALONE_DECODE], drained=error.drained)
        now = self._registry.now()
        able = [i for i in able if not i.suspect and not i.breaker.busy(now)] or able
        able = [i for i in able if i.prefers(Role.DECODE)] or able
        if has_capacity is not None:
            able = [i for i in able if has_capacity(i)]
            if not able:
                raise NoCapacity
        engine = self._pick_decode(None, able, traits)
        self._turn += 1
        return SingleEngine(engine, traits.tokens, traits.tokens)

    def choose_single(
        self, model: str | None, *, computes: bool = False, avoided: Collection[Instance] = ()
    ) -> Instance:
        """Choose an instance for a route that a single engine answers, such as /tokenize.

        Args:
            computes: the route runs the model: only instances that need no pair for that, prefills first.
            avoided: chosen only where there are no others.
        """
        accepting = self._registry.accepting
        ready = list(dict.fromkeys([*accepting(Role.PREFILL, model), *accepting(Role.DECODE, model)]))
        if computes:
            ready = [i for i in ready if i.kind.computes]
        ready = [i for i in ready if i not in avoided and not i.suspect] or ready
        if computes:
            ready = [i for i in ready if i.prefers(Role.PREFILL)] or ready
        if not ready:
            raise no_candidates(self._registry, model, (), ())
        self._turn += 1
        return self._pick_prefill(ready, NO_TRAITS)[0]

    def standalone_engines(self, model: str | None, excluded: Collection[Instance] = ()) -> Sequence[Instance]:
        """See :meth:`Candidates.alone`."""
        return self._candidates.alone(model, excluded)

    def ready_alone(self) -> int:
        """See :meth:`Candidates.ready_alone`."""
        return self._candidates.ready_alone()

    def ready_pairs(self, *, busy: bool = False) -> int:
        """See :meth:`Candidates.ready_pairs`."""
        return self._candidates.ready_pairs(busy=busy)
