"""Which prefill and which decode serve a request: both must be ready, not drained, and serve the same model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.policy import Policy
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import NoPair, UnknownModel


@dataclass(frozen=True, slots=True)
class Pair:
    """The two instances of one request."""

    prefill: Instance
    decode: Instance


STALE = (
    "every ready prefill instance has sent KV to a decode process that is gone and would freeze on the new one; "
    "restart the prefill instances"
)
"""vLLM 0.9.2 - 0.23 keeps the NCCL communicator of an address (``p2p_nccl_engine.py``, ``create_connect``)."""


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
        partners = [i for i in decodes if self._registry.can_exchange(prefill, i)]
        return Pair(prefill, partners[self._decode_policy(partners, turn)])

    def check(self, model: str | None) -> None:
        """Raise what :meth:`choose` raises where no room could help; no turn is taken."""
        self._able(model, ())

    def _able(self, model: str | None, without: Collection[Instance]) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Prefills and decodes that could serve ``model``, each of them with one of the others."""
        found = self._candidates(model)
        now = self._registry.now()
        prefills, decodes = ([i for i in side if i.breaker.permits(now) and i not in without] for side in found)
        if not prefills or not decodes:
            idle = [role.value for role, side in zip(Role, (prefills, decodes), strict=True) if not side]
            why = [f"every {role} instance has kept failing and is left alone for a while" for role in idle]
            raise self._apart(model, why)
        prefills = self._with_partner(prefills, decodes)
        if not prefills:
            raise self._apart(model, [STALE])
        return prefills, decodes

    def _with_partner(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[Instance]:
        """Prefills that can still exchange KV with one of ``decodes``."""
        can = self._registry.can_exchange
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
        common = any(_share_a_model(p, d) for p in prefills for d in decodes)
        why = STALE if common else "no prefill and decode instance serve the same model"
        return f"{why}; {DRAINED}" if self._drained_pair(_share_a_model) else why

    def ready_pairs(self) -> int:
        """How many prefill/decode combinations share a model, can exchange KV and take requests."""
        prefills, decodes = (self.taking(role) for role in (Role.PREFILL, Role.DECODE))
        can = self._registry.can_exchange
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
        can = self._registry.can_exchange
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
