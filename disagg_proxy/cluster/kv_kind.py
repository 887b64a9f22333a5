"""How an instance exchanges KV, and which two can: same protocol, and caches whose blocks mean the same. Pure."""

from __future__ import annotations

from dataclasses import dataclass

P2P_NCCL = "p2p_nccl"
"""vLLM's own P2pNcclConnector, 0.9.2 - 0.23: the request id carries both KV addresses, prefill comes first."""

DISAGG_KV = "disagg_kv"
"""This project's connector (docs/connector.md), vLLM 0.21 and newer: both legs at once, by ``kv_transfer_params``."""


@dataclass(frozen=True, slots=True)
class KvKind:
    """What an instance announced about its KV.

    Attributes:
        protocol: :data:`P2P_NCCL` or :data:`DISAGG_KV`.
        traits: what must be equal on both sides, by name.
        transports: ways to move the bytes, of which one must be common; empty where the protocol knows one only.
    """

    protocol: str = P2P_NCCL
    traits: tuple[tuple[str, str | int], ...] = ()
    transports: frozenset[str] = frozenset()

    @property
    def together(self) -> bool:
        """Whether both legs may be asked at once, and decode computes by itself what does not come."""
        return self.protocol == DISAGG_KV


P2P = KvKind()


def why_apart(prefill: KvKind, decode: KvKind) -> str | None:
    """What keeps two instances from exchanging KV, for people; None when they can."""
    if prefill.protocol != decode.protocol:
        return f"prefill speaks {prefill.protocol}, decode {decode.protocol}"
    theirs = dict(decode.traits)
    differing = [f"{name} is {value}, on decode {theirs.get(name)}" for name, value in prefill.traits
                 if theirs.get(name) != value]  # fmt: skip
    if differing:
        return "; ".join(differing)
    if (prefill.transports or decode.transports) and not prefill.transports & decode.transports:
        return "no common transport"
    return None
