"""How an instance exchanges KV, and which two can: same protocol, and caches whose blocks mean the same. Pure."""

from __future__ import annotations

from dataclasses import dataclass

P2P_NCCL = "p2p_nccl"
"""vLLM's own P2pNcclConnector, 0.9.2 - 0.23: the request id carries both KV addresses, prefill comes first."""

DISAGG_KV = "disagg_kv"
"""This project's connector (docs/connector.md), vLLM 0.21 and newer: both legs at once, by ``kv_transfer_params``."""

NIXL = "nixl"
"""vLLM's NixlConnector: prefill's answer says where the KV is. Such instances do not ping (docs/nixl.md)."""

MOST_RANKS = 64
"""Bound on what an announcement may claim."""


@dataclass(frozen=True, slots=True)
class KvKind:
    """What an instance announced about its KV.

    Attributes:
        protocol: :data:`P2P_NCCL`, :data:`DISAGG_KV` or :data:`NIXL`.
        traits: what must be equal where both sides name it. ``kv_digest`` stands for the model's weights and
            configuration; where one side has none, ``kv_model``, the model's name, is compared in its place.
        transports: ways to move the bytes, of which one must be common; empty where the protocol knows one only.
    """

    protocol: str = P2P_NCCL
    traits: tuple[tuple[str, str | int], ...] = ()
    transports: frozenset[str] = frozenset()

    @property
    def computes(self) -> bool:
        """Whether decode computes by itself what it gets no KV for; P2pNcclConnector's waits for it for ever."""
        return self.protocol != P2P_NCCL

    @property
    def ranks(self) -> int:
        """How many KV ports one instance has, counted up from its KV address: one for each tensor parallel rank."""
        tp = dict(self.traits).get("tp")
        return tp if isinstance(tp, int) and 1 <= tp <= MOST_RANKS else 1

    @property
    def addressed(self) -> bool:
        """Whether the proxy has to know the KV address of an instance."""
        return self.protocol != NIXL


P2P = KvKind()
BY_NIXL = KvKind(NIXL)


_MODEL = frozenset({"kv_model", "kv_digest"})


def alike_but_for_model(one: KvKind, other: KvKind) -> bool:
    """Whether the same engine with other weights would announce this."""
    caches = [dict(item for item in kind.traits if item[0] not in _MODEL) for kind in (one, other)]
    return one.protocol == other.protocol and one.transports == other.transports and caches[0] == caches[1]


def why_apart(prefill: KvKind, decode: KvKind) -> str | None:
    """What keeps two instances from exchanging KV, for people; None when they can."""
    if prefill.protocol != decode.protocol:
        return f"prefill speaks {prefill.protocol}, decode {decode.protocol}"
    ours, theirs = dict(prefill.traits), dict(decode.traits)
    ignored, differing = frozenset({"kv_digest"}), []
    if "kv_digest" in ours and "kv_digest" in theirs:
        ignored = _MODEL
        if ours["kv_digest"] != theirs["kv_digest"]:
            names = (f"{side.get('kv_model')}@{str(side['kv_digest'])[:12]}" for side in (ours, theirs))
            differing = ["kv_model is {}, on decode {} (other weights or configuration)".format(*names)]
    differing += [f"{name} is {value}, on decode {theirs[name]}" for name, value in prefill.traits
                  if name not in ignored and name in theirs and theirs[name] != value]  # fmt: skip
    if differing:
        return "; ".join(differing)
    if (prefill.transports or decode.transports) and not prefill.transports & decode.transports:
        return "no common transport"
    return None
