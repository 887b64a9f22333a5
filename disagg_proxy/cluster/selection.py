"""Which prefill and which decode serve a request: both must be ready, not drained, and serve the same model."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policies import NO_TRAITS, Policy, Traits, View
from disagg_proxy.cluster.policies.joint import COLD_TOKENS
from disagg_proxy.cluster.policies.table import DOUBT, PrefixTable
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import NoPair, UnknownModel


@dataclass(slots=True, unsafe_hash=True)
class Pair:
    """The two instances of one request.

    Attributes:
        prefill_tokens: prompt tokens that prefill has to compute, as far as is known, and part of those that it has.
        decode_tokens: those that decode holds.
    """

    prefill: Instance
    decode: Instance
    prefill_tokens: int = field(default=0, compare=False)
    decode_tokens: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.prefill} and {self.decode}"


@dataclass(frozen=True, slots=True)
class SingleEngine:
    """A decode that computes one request by itself."""

    decode: Instance
    decode_tokens: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.decode} alone"


class PlacementPreference(Enum):
    """Who shall serve a request."""

    PAIR = "a pair"
    EITHER = "a pair, or a decode alone while there is none"
    RATHER_ALONE = "a decode alone, or a pair while none can"
    ALONE = "a decode alone"


DRAINED = "others are drained for maintenance"


class NoCapacity(Exception):
    """Every instance that could serve a request has as many as it may have."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who could serve one model while no instance changes.

    Attributes:
        version, exchanges: those of the registry and its exchange when it was made.
        prefills: those that can exchange KV with a decode. partners: for each of them those decodes.
        warm: for each prefill whether it has met all its partners.
    """

    version: int
    exchanges: int
    prefills: Sequence[Instance]
    partners: Mapping[Instance, Sequence[Instance]]
    warm: Mapping[Instance, bool]


class Selection:
    """Chooses pairs from a registry with one policy per role.

    Args:
        table: what is known of the prefills' caches; needed by a policy that wants prefixes.
        bound: the load bound of :class:`View`.
        random: gives numbers in [0, 1).

    Attributes:
        distance: what moving KV from a prefill to a decode costs beyond the least, in tokens of decode load; None
            while nothing tells where the instances are. Must not change without the registry's version.
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
        self._prefill_policy = prefill_policy
        self._decode_policy = decode_policy
        self._table = table if prefill_policy.wants_prefix else None
        self._bound = bound
        self._random = random
        self._turn = 0
        self._plans: dict[str | None, _Plan] = {}
        self.distance: Callable[[Instance, Instance], int] | None = None

    @property
    def wants_prefix(self) -> bool:
        """Whether a policy needs the names of a prompt's beginnings."""
        return self._prefill_policy.wants_prefix

    @property
    def wants_session(self) -> bool:
        """Whether a policy needs the name of the client's session."""
        return self._prefill_policy.wants_session or self._decode_policy.wants_session

    def choose(
        self,
        model: str | None,
        without: Collection[Instance] = (),
        room: Callable[[Instance], bool] | None = None,
        traits: Traits = NO_TRAITS,
    ) -> Pair:
        """The pair for ``model``; None is the instances' own default model, as in vLLM.

        Args:
            without: instances that this request has already met in vain.
            room: whether an instance may get one more request.
            traits: what the policies may know of the request.

        Raises:
            UnknownModel: no ready instance of either role serves it.
            NoPair: a prefill or a decode that serves it is missing, drained, or left alone by its breaker.
            NoRoom: all that could serve it are full.
        """
        pair = None if without else self._choose_free(model, room, traits)
        if pair is None:
            prefills, decodes = self._able(model, without)
            if room is not None:
                decodes = [i for i in decodes if room(i)]
                prefills = self._with_partner([i for i in prefills if room(i)], decodes)
                if not prefills:
                    raise NoCapacity
            prefill, fresh = self._pick_prefill(prefills, traits)
            partners = [i for i in decodes if self._registry.kv_compatibility.possible(prefill, i)]
            decode = self._pick_decode(prefill, partners, traits)
            pair = Pair(prefill, decode, fresh, traits.tokens)
        self._turn += 1
        if self._table is not None:
            self._table.learn(traits, pair.prefill)
        return pair

    def _choose_free(self, model: str | None, room: Callable[[Instance], bool] | None, traits: Traits) -> Pair | None:
        """The pair that the policies take among all, if nothing speaks against these two; asks nobody else."""
        registry = self._registry
        plan = self._plans.get(model)
        if plan is None or plan.version != registry.version or plan.exchanges != registry.kv_compatibility.version:
            plan = self._plan(model)
            if plan is None:
                return None
        if len(plan.prefills) == 1 and not traits.prefix:
            prefill, fresh = plan.prefills[0], traits.tokens
        else:
            prefill, fresh = self._pick_prefill(plan.prefills, traits)
        if not self._free(prefill, room):
            return None
        partners = plan.partners[prefill]
        if len(partners) == 1:
            decode = partners[0]
        else:
            decode = self._pick_decode(prefill, partners, traits, warm=plan.warm[prefill])
        return Pair(prefill, decode, fresh, traits.tokens) if self._free(decode, room) else None

    def _free(self, instance: Instance, room: Callable[[Instance], bool] | None) -> bool:
        if room is not None and not room(instance):
            return False
        breaker = instance.breaker
        return breaker.quiet or breaker.permits(self._registry.now())

    def _plan(self, model: str | None) -> _Plan | None:
        try:
            found, decodes = self._candidates(model)
        except (NoPair, UnknownModel):
            # Names that nobody serves are not kept: clients choose them, and there is no end to them.
            return None
        kv_compatibility = self._registry.kv_compatibility
        prefills = self._with_partner(found, decodes)
        if not prefills:
            return None
        partners = {p: tuple(d for d in decodes if kv_compatibility.possible(p, d)) for p in prefills}
        warm = {p: all(kv_compatibility.warm(p, d) for d in partners[p]) for p in prefills}
        version = self._registry.version
        if any(plan.version != version for plan in self._plans.values()):
            self._plans.clear()
        self._plans[model] = plan = _Plan(version, kv_compatibility.version, prefills, partners, warm)
        return plan

    def _pick_prefill(self, prefills: Sequence[Instance], traits: Traits) -> tuple[Instance, int]:
        """One of them, and the prompt tokens that count as its load."""
        policy = self._prefill_policy
        view = View(prefills, self._turn, traits, bound=self._bound)
        if self._table is not None and traits.tokens:
            view.fresh = self._table.fresh(traits, prefills)
        if policy.wants_random:
            view.random = self._random()
        at = policy.pick(view)
        if not view.fresh:
            return prefills[at], traits.tokens
        fresh = view.fresh[at]
        return prefills[at], fresh + (traits.tokens - fresh) // DOUBT

    def _pick_decode(
        self, prefill: Instance | None, decodes: Sequence[Instance], traits: Traits, warm: bool = False
    ) -> Instance:
        if len(decodes) == 1:
            return decodes[0]
        policy = self._decode_policy
        view = View(decodes, self._turn, traits, bound=self._bound)
        if policy.wants_links and prefill is not None and not (warm and self.distance is None):
            view.links = self._links(prefill, decodes)
        if policy.wants_random:
            view.random = self._random()
        return decodes[policy.pick(view)]

    def _links(self, prefill: Instance, decodes: Sequence[Instance]) -> Sequence[int]:
        warm, distance = self._registry.kv_compatibility.warm, self.distance
        costs = [0 if warm(prefill, d) else COLD_TOKENS for d in decodes]
        return costs if distance is None else [c + distance(prefill, d) for c, d in zip(costs, decodes, strict=True)]

    def place(
        self,
        model: str | None,
        preference: PlacementPreference,
        without: Collection[Instance] = (),
        room: Callable[[Instance], bool] | None = None,
        traits: Traits = NO_TRAITS,
    ) -> Pair | SingleEngine:
        """Who serves a request, by its wish; arguments and errors as for :meth:`choose`."""
        if preference in (PlacementPreference.ALONE, PlacementPreference.RATHER_ALONE) and (
            preference is PlacementPreference.ALONE or self.standalone_decodes(model, without)
        ):
            return self._choose_alone(model, without, room, traits)
        try:
            return self.choose(model, without, room, traits)
        except NoPair:
            if preference is PlacementPreference.PAIR or not self.standalone_decodes(model, without):
                raise
            return self._choose_alone(model, without, room, traits)

    def check(
        self,
        model: str | None,
        preference: PlacementPreference = PlacementPreference.PAIR,
        without: Collection[Instance] = (),
    ) -> None:
        """Raise what :meth:`place` raises where no room could help; no turn is taken."""
        if preference is not PlacementPreference.PAIR and self.standalone_decodes(model, without):
            return
        self._able(model, without)

    def standalone_decodes(self, model: str | None, without: Collection[Instance] = ()) -> Sequence[Instance]:
        """Decodes that can serve ``model`` by themselves. P2pNcclConnector's cannot: they wait for KV for ever."""
        now = self._registry.now()
        return [
            i
            for i in self.taking(Role.DECODE, model)
            if i.kind.computes and i.breaker.permits(now) and i not in without
        ]

    def _choose_alone(
        self,
        model: str | None,
        without: Collection[Instance],
        room: Callable[[Instance], bool] | None,
        traits: Traits,
    ) -> SingleEngine:
        able = self.standalone_decodes(model, without)
        if not able:
            nothing = self._nothing(model, (), ())
            if isinstance(nothing, UnknownModel) or self._registry.missing():
                raise nothing
            raise NoPair(["no decode instance that computes by itself is ready"], drained=nothing.drained)
        if room is not None:
            able = [i for i in able if room(i)]
            if not able:
                raise NoCapacity
        decode = self._pick_decode(None, able, traits)
        self._turn += 1
        return SingleEngine(decode, traits.tokens)

    def _able(self, model: str | None, without: Collection[Instance]) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Prefills and decodes that could serve ``model``, each of them with one of the others."""
        found = self._candidates(model)
        now = self._registry.now()
        prefills, decodes = ([i for i in side if i.breaker.permits(now) and i not in without] for side in found)
        if not prefills or not decodes:
            idle = [role.value for role, side in zip(Role, (prefills, decodes), strict=True) if not side]
            why = [f"every {role} instance has kept failing and is left alone for a while" for role in idle]
            raise self._apart(model, why)
        partnered = self._with_partner(prefills, decodes)
        if not partnered:
            raise self._apart(model, self._why_apart(prefills, decodes))
        return partnered, decodes

    def _why_apart(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[str]:
        """Why none of them can exchange KV; names no address."""
        why = self._registry.kv_compatibility.why_not
        return sorted({why(p, d) or "" for p in prefills for d in decodes})

    def _with_partner(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[Instance]:
        """Prefills that can still exchange KV with one of ``decodes``."""
        can = self._registry.kv_compatibility.possible
        return [p for p in prefills if any(can(p, d) for d in decodes)]

    def choose_one(self, model: str | None, *, computes: bool = False) -> Instance:
        """Any ready instance that serves ``model``, for routes that one engine answers alone.

        Args:
            computes: only instances that may compute a prompt without a pair; prefills first, whose work it is like.
        """
        ready = [*self.taking(Role.PREFILL, model), *self.taking(Role.DECODE, model)]
        if computes:
            able = [i for i in ready if i.kind.computes]
            ready = [i for i in able if i.role is Role.PREFILL] or able
        if not ready:
            raise self._nothing(model, [], [])
        self._turn += 1
        return self._pick_prefill(ready, NO_TRAITS)[0]

    def taking(self, role: Role, model: str | None = None) -> Sequence[Instance]:
        """Ready instances of one role that serve ``model``, any for None, and are not out for maintenance."""
        return [i for i in self._registry.serving(role, model) if not i.draining]

    def _candidates(self, model: str | None) -> tuple[Sequence[Instance], Sequence[Instance]]:
        if model is not None:
            prefills, decodes = (self.taking(role, model) for role in (Role.PREFILL, Role.DECODE))
        else:
            # Each engine falls back to its own default, so only instances with the same one may meet.
            default = self._default_model()
            prefills, decodes = (
                [i for i in self.taking(role) if default is not None and i.default_model == default]
                for role in (Role.PREFILL, Role.DECODE)
            )
        if not prefills or not decodes:
            raise self._nothing(model, prefills, decodes)
        return prefills, decodes

    def _default_model(self) -> str | None:
        """The default model of a prefill that some decode has as its default too."""
        decodes = {instance.default_model for instance in self.taking(Role.DECODE)}
        defaults = [instance.default_model for instance in self.taking(Role.PREFILL)]
        return next((name for name in defaults if name in decodes), None)

    def _nothing(
        self, model: str | None, prefills: Sequence[Instance], decodes: Sequence[Instance]
    ) -> NoPair | UnknownModel:
        known = self._registry.models()
        drained = self._drained_pair(_fit_for(model))
        if model is not None and known and model not in known and not drained:
            return UnknownModel(model, sorted(known))
        missing = self._registry.missing()
        if not missing:
            what = f"that serves {model!r}" if model is not None else "with the same default model as the other side"
            roles = [(Role.PREFILL, prefills), (Role.DECODE, decodes)]
            missing = [f"no ready {role.value} instance {what}" for role, found in roles if not found]
            return self._apart(model, missing)
        return NoPair(missing, drained=drained)

    def _apart(self, model: str | None, why: list[str]) -> NoPair:
        """There are instances of both roles, but ``why``."""
        drained = self._drained_pair(_fit_for(model))
        return NoPair([*why, DRAINED] if drained else why, drained=drained)

    def why_no_pair(self) -> str:
        """What keeps ready instances of both roles apart."""
        prefills, decodes = (self.taking(role) for role in (Role.PREFILL, Role.DECODE))
        common = [(p, d) for p in prefills for d in decodes if _share_a_model(p, d)]
        why = "no prefill and decode instance serve the same model"
        if common:
            why = "; ".join(sorted({self._registry.kv_compatibility.why_not(p, d) or "" for p, d in common}))
        return f"{why}; {DRAINED}" if self._drained_pair(_share_a_model) else why

    def ready_pairs(self) -> int:
        """How many prefill/decode combinations share a model, can exchange KV and take requests."""
        prefills, decodes = (self.taking(role) for role in (Role.PREFILL, Role.DECODE))
        can = self._registry.kv_compatibility.possible
        return sum(1 for p in prefills for d in decodes if _share_a_model(p, d) and can(p, d))

    def _drained_pair(self, fit: Callable[[Instance, Instance], bool]) -> bool:
        """Whether there would be a pair but for a drain.

        A drained instance counts in any state, since its operator may be restarting it, and then a drained prefill
        forgets which decodes it knew.
        """
        drained = {role: self._registry.drained(role) for role in Role}
        if not any(drained.values()):
            return False
        prefills, decodes = ([*self.taking(role), *drained[role]] for role in (Role.PREFILL, Role.DECODE))
        can = self._registry.kv_compatibility.possible
        return any(
            (p.draining or d.draining) and fit(p, d) and (p.draining or can(p, d)) for p in prefills for d in decodes
        )


def _share_a_model(prefill: Instance, decode: Instance) -> bool:
    return not prefill.models.keys().isdisjoint(decode.models)


def _fit_for(model: str | None) -> Callable[[Instance, Instance], bool]:
    """Whether two instances serve ``model`` together, None for their own default model."""

    def fit(prefill: Instance, decode: Instance) -> bool:
        if model is None:
            return prefill.default_model is not None and prefill.default_model == decode.default_model
        return model in prefill.models and model in decode.models

    return fit
