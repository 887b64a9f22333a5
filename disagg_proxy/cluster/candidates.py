"""Which instances could serve a request: by state, model, drain, circuit breaker and KV."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.cluster.unavailable import ejected, incompatible, no_candidates, share_a_model
from disagg_proxy.errors import NoPair, UnknownModel


@dataclass(frozen=True, slots=True)
class Plan:
    """The candidates for one model, cached until an instance changes.

    Attributes:
        registry_version, kv_version: ``version`` of the registry and of its KvCompatibility when it was made.
        prefills: those that can send KV to at least one decode.
        partners: for each of these prefills the decodes it can send KV to.
        connected: for each prefill whether its connections to all partners exist.
        alone: of all these those that serve a request alone, whatever their role.
    """

    registry_version: int
    kv_version: int
    prefills: Sequence[Instance]
    partners: Mapping[Instance, Sequence[Instance]]
    connected: Mapping[Instance, bool]
    alone: Sequence[Instance]


class Candidates:
    """The instances of a registry that could serve a request.

    Attributes:
        prefills_alone: whether prefills serve requests alone too, where their connector allows it and no decode can.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._plans: dict[str | None, Plan] = {}
        self.prefills_alone = False

    def plan(self, model: str | None) -> Plan | None:
        """The cached candidates, made anew where an instance has changed; None without any."""
        registry = self._registry
        plan = self._plans.get(model)
        if (
            plan is None
            or plan.registry_version != registry.version
            or plan.kv_version != registry.kv_compatibility.version
        ):
            plan = self._new_plan(model)
        return plan

    def _new_plan(self, model: str | None) -> Plan | None:
        decodes: Sequence[Instance]
        prefills: Sequence[Instance]
        try:
            found, decodes = self._candidates(model)
        except (NoPair, UnknownModel):
            # Not cached for names that no instance serves: clients choose them, so their number is unbounded.
            return None
        kv_compatibility = self._registry.kv_compatibility
        prefills = self.with_partner(found, decodes)
        if not prefills:
            return None
        prefills, decodes = self._by_role(*self._rather(prefills, decodes, lambda i: not i.suspect))
        partners = {p: tuple(d for d in decodes if kv_compatibility.compatible(p, d)) for p in prefills}
        connected = {p: all(kv_compatibility.connected(p, d) for d in partners[p]) for p in prefills}
        version = self._registry.version
        if any(plan.registry_version != version for plan in self._plans.values()):
            self._plans.clear()
        alone = [i for i in dict.fromkeys([*prefills, *decodes]) if i.kind.either_alone]
        self._plans[model] = plan = Plan(version, kv_compatibility.version, prefills, partners, connected, alone)
        return plan

    def alone(self, model: str | None, excluded: Collection[Instance] = ()) -> Sequence[Instance]:
        """Engines that can serve ``model`` alone: decodes, or prefills with :attr:`prefills_alone`.

        Those of P2pNcclConnector cannot: they wait for KV, without a timeout.
        """
        now = self._registry.now()
        for role in Role.DECODE, Role.PREFILL:
            able = [
                i
                for i in self._registry.accepting(role, model)
                if i.kind.computes and i.breaker.permits(now) and i not in excluded
            ]
            if able or not self.prefills_alone:
                break
        return able if role is Role.DECODE else [i for i in able if i.kind.either_alone]

    def available(
        self, model: str | None, excluded: Collection[Instance]
    ) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Prefills and decodes that can serve ``model`` now; each prefill can send KV to one of the decodes."""
        found = self._candidates(model)
        now = self._registry.now()
        prefills, decodes = ([i for i in side if i.breaker.permits(now) and i not in excluded] for side in found)
        if not prefills or not decodes:
            raise ejected(self._registry, model, bool(prefills), bool(decodes))
        partnered = self.with_partner(prefills, decodes)
        if not partnered:
            raise incompatible(self._registry, model, prefills, decodes)
        return self._by_role(*self._rather(partnered, decodes, lambda i: not i.suspect and not i.breaker.busy(now)))

    def _rather(
        self, prefills: Sequence[Instance], decodes: Sequence[Instance], wanted: Callable[[Instance], bool]
    ) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Those that are ``wanted``, where they form pairs, else all; each of ``prefills`` has a partner."""
        better = [i for i in prefills if wanted(i)]
        prefills = better or prefills
        partners = [i for i in decodes if wanted(i)]
        if better := self.with_partner(prefills, partners):
            return better, partners
        return prefills, decodes

    def _by_role(
        self, prefills: Sequence[Instance], decodes: Sequence[Instance]
    ) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Without those whose assigned role is the other one, as far as pairs are left; each prefill has a partner."""
        prefer_prefill = [i for i in prefills if i.prefers(Role.PREFILL)]
        prefer_decode = [i for i in decodes if i.prefers(Role.DECODE)]
        if len(prefer_prefill) == len(prefills) and len(prefer_decode) == len(decodes):
            return prefills, decodes
        for some, others in ((prefer_prefill, prefer_decode), (prefills, prefer_decode), (prefer_prefill, decodes)):
            if partnered := self.with_partner(some, others):
                return partnered, others
        return prefills, decodes

    def with_partner(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> list[Instance]:
        """Those of ``prefills`` that can send KV to one of ``decodes``."""
        compatible = self._registry.kv_compatibility.compatible
        return [p for p in prefills if any(compatible(p, d) for d in decodes)]

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
        """How many engines can serve a request now without a pair, as :meth:`alone` has it."""
        able = sum(i.kind.computes for i in self._registry.able(Role.DECODE))
        if able or not self.prefills_alone:
            return able
        return sum(i.kind.either_alone for i in self._registry.able(Role.PREFILL))

    def ready_pairs(self, *, busy: bool = False) -> int:
        """How many combinations of prefill and decode can serve a request now: they accept requests, are neither
        ejected nor busy, share a model and can exchange KV. /health, the metrics and the page use this definition.

        Args:
            busy: count busy instances too.
        """
        prefills, decodes = (self._registry.able(role, busy=busy) for role in (Role.PREFILL, Role.DECODE))
        compatible = self._registry.kv_compatibility.compatible
        return sum(1 for p in prefills for d in decodes if share_a_model(p, d) and compatible(p, d))
