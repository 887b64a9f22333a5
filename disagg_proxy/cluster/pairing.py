"""Which prefill and which decode serve a request: both must be ready, not drained, and serve the same model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policy import Policy
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import NoPair, UnknownModel


@dataclass(frozen=True, slots=True)
class Pair:
    """The two instances of one request."""

    prefill: Instance
    decode: Instance

    def __str__(self) -> str:
        return f"{self.prefill} and {self.decode}"


@dataclass(frozen=True, slots=True)
class Alone:
    """A decode that computes one request by itself."""

    decode: Instance

    def __str__(self) -> str:
        return f"{self.decode} alone"


class Wish(Enum):
    """Who shall serve a request."""

    PAIR = "a pair"
    EITHER = "a pair, or a decode alone while there is none"
    RATHER_ALONE = "a decode alone, or a pair while none can"
    ALONE = "a decode alone"


DRAINED = "others are drained for maintenance"


class NoRoom(Exception):
    """Every instance that could serve a request has as many as it may have."""


class Pairing:
    """Chooses pairs from a registry with one policy per role."""

    def __init__(self, registry: Registry, prefill_policy: Policy, decode_policy: Policy) -> None:
        self._registry = registry
        self._prefill_policy = prefill_policy
        self._decode_policy = decode_policy
        self._turn = 0

    def choose(
        self,
        model: str | None,
        without: Collection[Instance] = (),
        room: Callable[[Instance], bool] | None = None,
    ) -> Pair:
        """The pair for ``model``; None is the instances' own default model, as in vLLM.

        Args:
            without: instances that this request has already met in vain.
            room: whether an instance may get one more request.

        Raises:
            UnknownModel: no ready instance of either role serves it.
            NoPair: a prefill or a decode that serves it is missing, drained, or left alone by its breaker.
            NoRoom: all that could serve it are full.
        """
        prefills, decodes = self._able(model, without)
        if room is not None:
            decodes = [i for i in decodes if room(i)]
            prefills = self._with_partner([i for i in prefills if room(i)], decodes)
            if not prefills:
                raise NoRoom
        turn = self._turn
        self._turn += 1
        prefill = prefills[self._prefill_policy(prefills, turn)]
        partners = [i for i in decodes if self._registry.exchange.possible(prefill, i)]
        return Pair(prefill, partners[self._decode_policy(partners, turn)])

    def place(
        self,
        model: str | None,
        wish: Wish,
        without: Collection[Instance] = (),
        room: Callable[[Instance], bool] | None = None,
    ) -> Pair | Alone:
        """Who serves a request, by its wish; arguments and errors as for :meth:`choose`."""
        if wish in (Wish.ALONE, Wish.RATHER_ALONE) and (wish is Wish.ALONE or self.loners(model, without)):
            return self._choose_alone(model, without, room)
        try:
            return self.choose(model, without, room)
        except NoPair:
            if wish is Wish.PAIR or not self.loners(model, without):
                raise
            return self._choose_alone(model, without, room)

    def check(self, model: str | None, wish: Wish = Wish.PAIR, without: Collection[Instance] = ()) -> None:
        """Raise what :meth:`place` raises where no room could help; no turn is taken."""
        if wish is not Wish.PAIR and self.loners(model, without):
            return
        self._able(model, without)

    def loners(self, model: str | None, without: Collection[Instance] = ()) -> Sequence[Instance]:
        """Decodes that can serve ``model`` by themselves. P2pNcclConnector's cannot: they wait for KV for ever."""
        now = self._registry.now()
        return [
            i
            for i in self.taking(Role.DECODE, model)
            if i.kind.together and i.breaker.permits(now) and i not in without
        ]

    def _choose_alone(
        self, model: str | None, without: Collection[Instance], room: Callable[[Instance], bool] | None
    ) -> Alone:
        able = self.loners(model, without)
        if not able:
            raise self._nothing(model, (), ())
        if room is not None:
            able = [i for i in able if room(i)]
            if not able:
                raise NoRoom
        turn = self._turn
        self._turn += 1
        return Alone(able[self._decode_policy(able, turn)])

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
        why = self._registry.exchange.why_not
        return sorted({why(p, d) or "" for p in prefills for d in decodes})

    def _with_partner(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[Instance]:
        """Prefills that can still exchange KV with one of ``decodes``."""
        can = self._registry.exchange.possible
        return [p for p in prefills if any(can(p, d) for d in decodes)]

    def choose_one(self, model: str | None) -> Instance:
        """Any ready instance that serves ``model``, for routes that one engine answers alone."""
        ready = [*self.taking(Role.PREFILL, model), *self.taking(Role.DECODE, model)]
        if not ready:
            raise self._nothing(model, [], [])
        self._turn += 1
        return ready[self._prefill_policy(ready, self._turn)]

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
            why = "; ".join(sorted({self._registry.exchange.why_not(p, d) or "" for p, d in common}))
        return f"{why}; {DRAINED}" if self._drained_pair(_share_a_model) else why

    def ready_pairs(self) -> int:
        """How many prefill/decode combinations share a model, can exchange KV and take requests."""
        prefills, decodes = (self.taking(role) for role in (Role.PREFILL, Role.DECODE))
        can = self._registry.exchange.possible
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
        can = self._registry.exchange.possible
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
