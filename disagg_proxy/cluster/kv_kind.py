"""How an instance exchanges KV, and which two instances can. Pure.

The protocols are those of disagg_proxy/connectors, one file each; nothing here knows a particular one.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_RANKS = 64
"""Bound on the tensor parallel size that an announcement may claim."""

_MODEL = frozenset({"kv_model", "kv_digest"})
_SECRET = "kv_secret"
_NO_SECRET = "none"
"""What an engine without a shared secret announces; others announce a digest of theirs."""


@dataclass(frozen=True, slots=True)
class KvKind:
    """The KV transfer of one instance.

    Attributes:
        protocol: name of the KV transfer protocol, which selects the proxy's connector.
        traits: names and values that must be equal where both sides announce them. ``kv_digest`` identifies the
            model's weights and configuration; where one side has none, ``kv_model``, the model's name, is compared.
        transports: ways to move the bytes, one of which both sides must have; empty where the protocol has only one.
        computes: whether decode computes a prompt for which it gets no KV, so that it can also serve requests alone.
            Where it does not, decode waits for the KV without a limit.
        needs_address: whether the proxy must know an instance's KV address before it can serve.
        both_roles: whether the engine prefills for others and decodes as well (vLLM's ``kv_role`` ``kv_both``). The
            role of such an instance is decode, for proxies that know one role only.
        either_alone: whether an engine of either role serves requests alone, whatever its KV transfer.
        peer_params: ``kv_transfer_params`` that describe this instance to the engine on the other side of a pair.
    """

    protocol: str
    traits: tuple[tuple[str, str | int], ...] = ()
    transports: frozenset[str] = frozenset()
    computes: bool = True
    needs_address: bool = True
    both_roles: bool = False
    either_alone: bool = False
    peer_params: tuple[tuple[str, str | int], ...] = ()

    @property
    def ranks(self) -> int:
        """Number of KV ports of one instance, consecutive from its KV address: one for each tensor parallel rank."""
        tp = dict(self.traits).get("tp")
        return tp if isinstance(tp, int) and 1 <= tp <= MAX_RANKS else 1


def alike_but_for_model(one: KvKind, other: KvKind) -> bool:
    """Whether the same engine with other weights, or with another shared secret, would announce this."""
    changes = _MODEL | {_SECRET}
    caches = [dict(item for item in kind.traits if item[0] not in changes) for kind in (one, other)]
    return one.protocol == other.protocol and one.transports == other.transports and caches[0] == caches[1]


def _secrets_differ(prefill: str | int | None, decode: str | int | None) -> str:
    if _NO_SECRET in (prefill, decode):
        return f"only {'decode' if prefill == _NO_SECRET else 'prefill'} has a shared secret (DISAGG_KV_SECRET)"
    return "the shared secret differs (DISAGG_KV_SECRET)"


def why_apart(prefill: KvKind, decode: KvKind) -> str | None:
    """What keeps two instances from exchanging KV, in words for an operator; None when they can."""
    if prefill.protocol != decode.protocol:
        return f"prefill speaks {prefill.protocol}, decode {decode.protocol}"
    ours, theirs = dict(prefill.traits), dict(decode.traits)
    ignored, differing = frozenset({"kv_digest", _SECRET}), []
    if "kv_digest" in ours and "kv_digest" in theirs:
        ignored = _MODEL | {_SECRET}
        if ours["kv_digest"] != theirs["kv_digest"]:
            names = (f"{side.get('kv_model')}@{str(side['kv_digest'])[:12]}" for side in (ours, theirs))
            differing = ["kv_model is {}, on decode {} (other weights or configuration)".format(*names)]
    if (secrets := [side.get(_SECRET) for side in (ours, theirs)])[0] != secrets[1] and None not in secrets:
        differing.append(_secrets_differ(*secrets))
    differing += [f"{name} is {value}, on decode {theirs[name]}" for name, value in prefill.traits
                  if name not in ignored and name in theirs and theirs[name] != value]  # fmt: skip
    if differing:
        return "; ".join(differing)
    if (prefill.transports or decode.transports) and not prefill.transports & decode.transports:
        return "no common transport"
    return None
