"""Which instances serve a request: candidates by state, model, drain, circuit breaker and KV, then the policies."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import NO_TRAITS, Policy, Traits, View
from disagg_proxy.cluster.policies.joint import COLD_TOKENS
from disagg_proxy.cluster.policies.table import CACHED_LOAD_DIVISOR, PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.unavailable import (
    NO_STANDALONE_DECODE,
    ejected,
    incompatible,
    missing_roles,
    no_candidates,
    share_a_model,
)
from disagg_proxy.errors import NoPair, UnknownModel


@dataclass(slots=True, unsafe_hash=True)
class Pair:
    """The two instances of one attempt.

    Attributes:
        prefill_tokens: prompt tokens that count as load on prefill: those it has to compute, as far as is known, and
            a share of those in its prefix cache.
        decode_tokens: prompt tokens that decode holds.
    """

    prefill: Instance
    decode: Instance
    prefill_tokens: int = field(default=0, compare=False)
    decode_tokens: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.prefill} and {self.decode}"


@dataclass(frozen=True, slots=True)
class SingleEngine:
    """A decode that serves one attempt without a prefill."""

    decode: Instance
    decode_tokens: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.decode} alone"


class PlacementPreference(Enum):
    """Whether a pair or a decode alone serves a request."""

    PAIR = "a pair"
    EITHER = "a pair, or a decode alone if there is no pair"
    RATHER_ALONE = "a decode alone, or a pair if no decode can"
    ALONE = "a decode alone"


class NoCapacity(Exception):
    """Every instance that could serve the request has reached its limits."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """The candidates for one model, cached until an instance changes.

    Attributes:
        registry_version, kv_version: ``version`` of the registry and of its KvCompatibility when it was made.
        prefills: those that can send KV to at least one decode.
        partners: for each of these prefills the decodes it can send KV to.
        connected: for each prefill whether its connections to all partners exist.
    """

    registry_version: int
    kv_version: int
    prefills: Sequence[Instance]
    partners: Mapping[Instance, Sequence[Instance]]
    connected: Mapping[Instance, bool]


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
        self._plans: dict[str | None, _Plan] = {}
        self.distance: Callable[[Instance, Instance], int] | None = None

    def set_policies(self, prefill: Policy, decode: Policy, bound: float) -> None:
        """Choose by these policies from now on; arguments as for the constructor."""
        self._prefill_policy = prefill
        self._decode_policy = decode
        self._table = self._prefixes if prefill.needs_prefix else None
        self._bound = bound

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
        pair = None if excluded else self._choose_cached(model, has_capacity, traits)
        if pair is None:
            prefills, decodes = self._available(model, excluded)
            if has_capacity is not None:
                decodes = [i for i in decodes if has_capacity(i)]
                prefills = self._with_partner([i for i in prefills if has_capacity(i)], decodes)
                if not prefills:
                    raise NoCapacity
            prefill, uncached = self._pick_prefill(prefills, traits)
            partners = [i for i in decodes if self._registry.kv_compatibility.compatible(prefill, i)]
            decode = self._pick_decode(prefill, partners, traits)
            pair = Pair(prefill, decode, uncached, traits.tokens)
        self._turn += 1
        if self._table is not None:
            self._table.record(traits, pair.prefill)
        return pair

    def _choose_cached(
        self, model: str | None, has_capacity: Callable[[Instance], bool] | None, traits: Traits
    ) -> Pair | None:
        """The fast path: the pair that the policies choose among the cached candidates.

        None when there are no candidates, or when a chosen instance has no capacity or an open circuit breaker.
        """
        registry = self._registry
        plan = self._plans.get(model)
        if (
            plan is None
            or plan.registry_version != registry.version
            or plan.kv_version != registry.kv_compatibility.version
        ):
            plan = self._plan(model)
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

    def _plan(self, model: str | None) -> _Plan | None:
        decodes: Sequence[Instance]
        prefills: Sequence[Instance]
        try:
            found, decodes = self._candidates(model)
        except (NoPair, UnknownModel):
            # Not cached for names that no instance serves: clients choose them, so their number is unbounded.
            return None
        kv_compatibility = self._registry.kv_compatibility
        prefills = self._with_partner(found, decodes)
        if not prefills:
            return None
        prefills, decodes = self._rather(prefills, decodes, lambda i: not i.suspect)
        partners = {p: tuple(d for d in decodes if kv_compatibility.compatible(p, d)) for p in prefills}
        connected = {p: all(kv_compatibility.connected(p, d) for d in partners[p]) for p in prefills}
        version = self._registry.version
        if any(plan.registry_version != version for plan in self._plans.values()):
            self._plans.clear()
        self._plans[model] = plan = _Plan(version, kv_compatibility.version, prefills, partners, connected)
        return plan

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
    ) -> Pair | SingleEngine:
        """Choose a pair or a decode alone, as ``preference`` says; arguments and errors as for :meth:`choose`."""
        if preference in (PlacementPreference.ALONE, PlacementPreference.RATHER_ALONE) and (
            preference is PlacementPreference.ALONE or self.standalone_decodes(model, excluded)
        ):
            return self._choose_standalone(model, excluded, has_capacity, traits)
        try:
            return self.choose(model, excluded, has_capacity, traits)
        except NoPair:
            if preference is PlacementPreference.PAIR or not self.standalone_decodes(model, excluded):
                raise
            return self._choose_standalone(model, excluded, has_capacity, traits)

    def check(
        self,
        model: str | None,
        preference: PlacementPreference = PlacementPreference.PAIR,
        excluded: Collection[Instance] = (),
    ) -> None:
        """Raise the errors of :meth:`place` that do not depend on capacity, without choosing."""
        if preference is not PlacementPreference.PAIR and self.standalone_decodes(model, excluded):
            return
        self._available(model, excluded)

    def standalone_decodes(self, model: str | None, excluded: Collection[Instance] = ()) -> Sequence[Instance]:
        """Decodes that can serve ``model`` without a prefill.

        Those of P2pNcclConnector cannot: they wait for KV, without a timeout.
        """
        now = self._registry.now()
        return [
            i
            for i in self._registry.accepting(Role.DECODE, model)
            if i.kind.computes and i.breaker.permits(now) and i not in excluded
        ]

    def _choose_standalone(
        self,
        model: str | None,
        excluded: Collection[Instance],
        has_capacity: Callable[[Instance], bool] | None,
        traits: Traits,
    ) -> SingleEngine:
        able = self.standalone_decodes(model, excluded)
        if not able:
            error = no_candidates(self._registry, model, (), ())
            if isinstance(error, UnknownModel) or missing_roles(self._registry):
                raise error
            raise NoPair([NO_STANDALONE_DECODE], drained=error.drained)
        now = self._registry.now()
        able = [i for i in able if not i.suspect and not i.breaker.busy(now)] or able
        if has_capacity is not None:
            able = [i for i in able if has_capacity(i)]
            if not able:
                raise NoCapacity
        decode = self._pick_decode(None, able, traits)
        self._turn += 1
        return SingleEngine(decode, traits.tokens)

    def _available(
        self, model: str | None, excluded: Collection[Instance]
    ) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Prefills and decodes that can serve ``model`` now; each prefill can send KV to one of the decodes."""
        found = self._candidates(model)
        now = self._registry.now()
        prefills, decodes = ([i for i in side if i.breaker.permits(now) and i not in excluded] for side in found)
        if not prefills or not decodes:
            raise ejected(self._registry, model, bool(prefills), bool(decodes))
        partnered = self._with_partner(prefills, decodes)
        if not partnered:
            raise incompatible(self._registry, model, prefills, decodes)
        return self._rather(partnered, decodes, lambda i: not i.suspect and not i.breaker.busy(now))

    def _rather(
        self, prefills: Sequence[Instance], decodes: Sequence[Instance], wanted: Callable[[Instance], bool]
    ) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Those that are ``wanted``, where they form pairs, else all; each of ``prefills`` has a partner."""
        better = [i for i in prefills if wanted(i)]
        prefills = better or prefills
        partners = [i for i in decodes if wanted(i)]
        if better := self._with_partner(prefills, partners):
            return better, partners
        return prefills, decodes

    def _with_partner(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[Instance]:
        """Those of ``prefills`` that can send KV to one of ``decodes``."""
        compatible = self._registry.kv_compatibility.compatible
        return [p for p in prefills if any(compatible(p, d) for d in decodes)]

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
            ready = [i for i in ready if i.serves(Role.PREFILL)] or ready
        if not ready:
            raise no_candidates(self._registry, model, (), ())
        self._turn += 1
        return self._pick_prefill(ready, NO_TRAITS)[0]

    def _candidates(self, model: str | None) -> tuple[Sequence[Instance], Sequence[Instance]]:
        if model is not None:
            prefills, decodes = (self._registry.accepting(role, model) for role in (Role.PREFILL, Role.DECODE))
        else:
            # Each engine falls back to its own default model, so both sides need the same one.
            default = self._default_model()
            prefills, decodes = (
                [i for i in self._registry.accepting(role) if default is not None and i.default_model == default]
                for role in (Role.PREFILL, Role.DECODE)
            )
        if not prefills or not decodes:
            raise no_candidates(self._registry, model, prefills, decodes)
        return prefills, decodes

    def _default_model(self) -> str | None:
        """The default model of a prefill that is also the default of a decode."""
        decodes = {instance.default_model for instance in self._registry.accepting(Role.DECODE)}
        defaults = [instance.default_model for instance in self._registry.accepting(Role.PREFILL)]
        return next((name for name in defaults if name in decodes), None)

    def ready_alone(self) -> int:
        """How many decodes can serve a request now without a prefill."""
        return sum(i.kind.computes for i in self._registry.able(Role.DECODE))

    def ready_pairs(self, *, busy: bool = False) -> int:
        """How many combinations of prefill and decode can serve a request now: they accept requests, are neither
        ejected nor busy, share a model and can exchange KV. /health, the metrics and the page use this definition.

        Args:
            busy: count busy instances too.
        """
        prefills, decodes = (self._registry.able(role, busy=busy) for role in (Role.PREFILL, Role.DECODE))
        compatible = self._registry.kv_compatibility.compatible
        return sum(1 for p in prefills for d in decodes if share_a_model(p, d) and compatible(p, d))
