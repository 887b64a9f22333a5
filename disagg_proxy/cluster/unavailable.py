"""Why no instances can serve a request, for error messages and /health. Clients read it, so it names no addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg_proxy.cluster.instance import Instance, Role
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import NoPair, UnknownModel

DRAINED = "others are drained for maintenance"

NO_STANDALONE_DECODE = "no decode instance that can serve without a prefill is ready"

_EJECTED = "every %s instance keeps failing and is ejected for a while (circuit breaker)"

_BUSY = "every %s instance is busy or ejected"

_MAX_NAMED = 3
"""Instances of one role whose states are named."""


def missing_roles(registry: Registry) -> list[str]:
    """Why no pair at all can serve, one entry for each role; empty when both roles accept requests."""
    missing = []
    for role in Role:
        if registry.accepting(role):
            continue
        known = [i for i in registry.instances() if i.serves(role)]
        why = "; ".join(
            "one is drained for maintenance" if i.draining else f"one is {i.state.value}: {i.reason}"
            for i in known[:_MAX_NAMED]
        )
        missing.append(f"no {role.value} instance is ready ({why or 'none has registered'})")
    return missing


def no_candidates(
    registry: Registry, model: str | None, prefills: Sequence[Instance], decodes: Sequence[Instance]
) -> NoPair | UnknownModel:
    """The error for a request for ``model`` when ``prefills`` or ``decodes``, which could serve it, are empty."""
    known = registry.models()
    drained = _drained_pair(registry, _serves(model))
    if model is not None and known and model not in known and not drained:
        return UnknownModel(model, sorted(known))
    missing = missing_roles(registry)
    if not missing:
        what = f"that serves {model!r}" if model is not None else "with the same default model as the other side"
        roles = [(Role.PREFILL, prefills), (Role.DECODE, decodes)]
        missing = [f"no ready {role.value} instance {what}" for role, found in roles if not found]
        return no_pair(registry, model, missing)
    return NoPair(missing, drained=drained)


def ejected(registry: Registry, model: str | None, prefills: bool, decodes: bool) -> NoPair:
    """The error when every prefill or every decode that serves ``model`` is ejected, or was tried before.

    Args:
        prefills, decodes: whether some of that role are left.
    """
    why = [_EJECTED % role.value for role, left in ((Role.PREFILL, prefills), (Role.DECODE, decodes)) if not left]
    return no_pair(registry, model, why)


def incompatible(
    registry: Registry, model: str | None, prefills: Sequence[Instance], decodes: Sequence[Instance]
) -> NoPair:
    """The error when none of ``prefills`` can send KV to any of ``decodes``."""
    return no_pair(registry, model, _reasons(registry, [(p, d) for p in prefills for d in decodes]))


def no_pair(registry: Registry, model: str | None, why: list[str]) -> NoPair:
    """The error with the reasons ``why``, and whether drained instances could serve ``model``."""
    drained = _drained_pair(registry, _serves(model))
    return NoPair([*why, DRAINED] if drained else why, drained=drained)


def why_no_pair(registry: Registry) -> str:
    """Why no pair can serve although both roles have ready instances."""
    if unable := [role for role in Role if not registry.able(role)]:
        return "; ".join(_why_unable(registry, role) for role in unable)
    prefills, decodes = registry.able(Role.PREFILL), registry.able(Role.DECODE)
    common = [(p, d) for p in prefills for d in decodes if share_a_model(p, d)]
    why = "no prefill and decode instance serve the same model"
    if common:
        why = "; ".join(_reasons(registry, common))
    return f"{why}; {DRAINED}" if _drained_pair(registry, share_a_model) else why


def _why_unable(registry: Registry, role: Role) -> str:
    return (_BUSY if registry.able(role, busy=True) else _EJECTED) % role.value


def share_a_model(prefill: Instance, decode: Instance) -> bool:
    """Whether there is a model that both serve."""
    return not prefill.models.keys().isdisjoint(decode.models)


def _reasons(registry: Registry, pairs: Sequence[tuple[Instance, Instance]]) -> list[str]:
    why = registry.kv_compatibility.why_not
    return sorted({why(prefill, decode) or "" for prefill, decode in pairs})


def _drained_pair(registry: Registry, fit: Callable[[Instance, Instance], bool]) -> bool:
    """Whether there would be a pair if nothing were drained.

    Drained instances count in any state, since the operator may be restarting them. A drained prefill also counts as
    compatible, since its restart ends its connections.
    """
    drained = {role: registry.drained(role) for role in Role}
    if not any(drained.values()):
        return False
    prefills, decodes = ([*registry.accepting(role), *drained[role]] for role in (Role.PREFILL, Role.DECODE))
    compatible = registry.kv_compatibility.compatible
    return any(
        (p.draining or d.draining) and fit(p, d) and (p.draining or compatible(p, d)) for p in prefills for d in decodes
    )


def _serves(model: str | None) -> Callable[[Instance, Instance], bool]:
    """Whether two instances serve ``model`` together; None is their common default model."""

    def fit(prefill: Instance, decode: Instance) -> bool:
        if model is None:
            return prefill.default_model is not None and prefill.default_model == decode.default_model
        return model in prefill.models and model in decode.models

    return fit
